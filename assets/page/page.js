// Addresses, keys and the start.

const view = byId('view');
const pageTitle = document.title;
const HELP = 'Choose a feature from the list; the arrow keys or j and k step through it, '
  + '/ goes to the search.';

let current = null; // id of the open feature, null in the overview

function addressedFeature() {
  try {
    return decodeURIComponent(location.hash.slice(1));
  } catch {  // a lone "%" is no encoded character
    return location.hash.slice(1);
  }
}

function openAddress() {
  const id = addressedFeature();
  if (id) showFeature(id);
  else showOverview();
}

function step(change) {
  const index = shown.findIndex(feature => feature.id === current) + change;
  const next = shown[Math.min(shown.length - 1, Math.max(0, index))];
  if (next) location.hash = next.id;
}

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.target.matches('input, select, textarea')) {
    if (event.key === 'Escape') event.target.blur();
    return;
  }
  if (event.key === 'ArrowRight' || event.key === 'j') step(1);
  else if (event.key === 'ArrowLeft' || event.key === 'k') step(-1);
  else if (event.key === '/') {
    event.preventDefault();
    query.focus();
  }
}

window.addEventListener('hashchange', openAddress);
document.addEventListener('keydown', onKey);
byId('home').addEventListener('click', () => { location.hash = ''; });
byId('next').addEventListener('click', () => step(1));
byId('back').addEventListener('click', () => step(-1));
for (const start of [fillSiteChoice, showList, openAddress]) {
  try {
    start();
  } catch (error) {
    console.error(error);
  }
}
