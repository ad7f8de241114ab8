// The list of features: search, order and the choice of a site.

const listBox = byId('list');
const query = byId('query');
const siteChoice = byId('site');
const PORTION = 150; // entries that are made at one time; more follow when the list is scrolled

let shown = []; // the features of the list, in its order
let reasons = new Map(); // why each of them matches, by id

const tested = feature => feature.detection?.[0] ?? null;

const ORDER = {
  max: feature => -feature.max,
  density: feature => -feature.density,
  sparse: feature => feature.density,
  score: feature => -(feature.score || 0),
  tested: feature => -(tested(feature) ?? 0),
  id: feature => Number(feature.id),
  site: feature => feature.site === null ? 99 : feature.site,
};

// How well one word of the query matches: [rank, reason], lower is better; null for no match.
function matchOf(feature, word) {
  if (feature.id === word) return [0, 'number'];
  const classes = feature.classes.map(name => name.toLowerCase());
  const whole = classes.indexOf(word);
  if (whole >= 0) return [1 + whole / 10, 'token “' + word + '”'];
  const label = (feature.label ?? '').toLowerCase();
  const labelWords = label.split(/[^\p{L}\p{N}]+/u);
  if (labelWords.includes(word)) return [2, 'label'];
  const promoted = feature.promoted.map(([number]) => data.words[number].trim().toLowerCase());
  if (promoted.includes(word)) return [3, 'promotes “' + word + '”'];
  const part = classes.find(name => name.includes(word));
  if (part !== undefined) return [4, 'in token “' + part + '”'];
  if (label.includes(word)) return [5, 'in label'];
  if (feature.id.includes(word)) return [6, 'in number'];
  return null;
}

// The worst of the matches of all words, with all reasons; null if a word does not match.
function match(feature, words) {
  if (siteChoice.value !== '' && String(feature.site) !== siteChoice.value) return null;
  const matched = words.map(word => matchOf(feature, word));
  if (matched.includes(null)) return null;
  return [Math.max(0, ...matched.map(([rank]) => rank)), matched.map(([, reason]) => reason)];
}

function listEntry(feature) {
  const facts = ['max ' + formatNumber(feature.max), formatNumber(100 * feature.density) + ' %'];
  if (feature.score) facts.push('score ' + feature.score);
  if (tested(feature) !== null) facts.push('tested ' + formatShare(tested(feature)));
  const link = featureLink(feature.id, facts.join(' · '));
  const reason = reasons.get(feature.id).join(', ');
  if (reason) link.append(element('small', 'found by ' + reason, 'reason'));
  link.dataset.id = feature.id;
  return link;
}

function showList() {
  const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
  const key = ORDER[byId('order').value];
  const ranks = new Map();
  reasons = new Map();
  for (const feature of data.features) {
    let found;
    try {
      found = match(feature, words);
    } catch { // its entry says what is wrong
      found = [99, []];
    }
    if (!found) continue;
    ranks.set(feature, found[0]);
    reasons.set(feature.id, found[1]);
  }
  shown = [...ranks.keys()];
  shown.sort((a, b) => ranks.get(a) - ranks.get(b) || key(a) - key(b) || a.id - b.id);
  listBox.replaceChildren();
  extendList(PORTION);
  byId('count').textContent = shown.length + ' of ' + data.features.length;
  markCurrent();
}

// Makes further entries of the list.
function extendList(count) {
  const start = listBox.children.length;
  const parts = document.createDocumentFragment();
  for (const feature of shown.slice(start, start + count)) {
    addPart(parts, 'Feature ' + feature.id, () => [listEntry(feature)]);
  }
  listBox.append(parts);
}

// Marks the open feature in the list and scrolls to it.
function markCurrent() {
  const index = shown.findIndex(feature => feature.id === current);
  if (index >= listBox.children.length) extendList(index + 1 - listBox.children.length);
  for (const link of listBox.querySelectorAll('a.on')) link.classList.remove('on');
  const link = index >= 0 ? listBox.children[index] : null;
  if (!link) return;
  link.classList.add('on');
  if (!listBox.offsetParent) return;
  const top = link.offsetTop - listBox.offsetTop;
  const bottom = top + link.offsetHeight;
  const visibleBottom = listBox.scrollTop + listBox.clientHeight;
  if (top < listBox.scrollTop || bottom > visibleBottom) listBox.scrollTop = top - 60;
}

function fillSiteChoice() {
  if (sites.length > 1 && data.features.some(feature => feature.site !== null)) {
    for (const site of sites) {
      const option = element('option', site);
      option.value = site;
      siteChoice.append(option);
    }
  } else {
    siteChoice.parentElement.hidden = true;
  }
}

listBox.addEventListener('scroll', () => {
  const below = listBox.scrollHeight - listBox.scrollTop - listBox.clientHeight;
  if (below < 1000) extendList(PORTION);
});
query.addEventListener('input', showList);
byId('order').addEventListener('change', showList);
siteChoice.addEventListener('change', showList);
