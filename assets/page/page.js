'use strict';
// Shows the data of the page. All texts are set by textContent, so that none becomes markup.
// A part that fails says so in its place and leaves the rest of the page as it is.

const byId = id => document.getElementById(id);
const data = JSON.parse(byId('data').textContent);
const view = byId('view');
const listBox = byId('list');
const query = byId('query');
const siteChoice = byId('site');
const QUARTERS = ['strongest quarter', 'second quarter', 'third quarter', 'weakest quarter'];
const HELP = 'Choose a feature from the list; the arrow keys or j and k step through it, '
  + '/ goes to the search.';

let shown = []; // the features of the list, in its order
let current = null; // id of the open feature, null in the overview

// ------------------------------------------------------------------------------ small elements

function element(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

function wrap(tag, className, children) {
  const node = element(tag, undefined, className);
  node.append(...children);
  return node;
}

// Appends the elements that build() returns, or one line if it fails.
function addPart(parent, name, build) {
  let parts;
  try {
    parts = build();
  } catch (error) {
    console.error(error);
    parts = [element('p', name + ' cannot be shown: ' + error.message, 'soft')];
  }
  parent.append(...parts);
}

function formatNumber(x) {
  if (x === null || x === undefined) return '–';
  if (x === 0) return '0';
  if (Math.abs(x) >= 100) return x.toFixed(0);
  if (Math.abs(x) < 1e-4) return x.toExponential(1);
  return String(Number(x.toPrecision(3)));
}

// A token with its line ends and other control characters made visible.
function visibleText(token) {
  return JSON.stringify(token).slice(1, -1).replaceAll('\\"', '"').replaceAll('\\\\', '\\');
}

function bars(values, names, titles) {
  const top = Math.max(...values, 1e-12);
  return wrap('div', 'bars', values.map((value, i) => {
    const bar = element('i');
    bar.style.height = 70 * value / top + 'px';
    const column = wrap('div', '', [bar, element('span', String(names[i]))]);
    column.title = titles[i] + ': ' + formatNumber(value);
    return column;
  }));
}

function table(head, rows) {
  const headRow = wrap('tr', '', head.map(cell => element('th', cell)));
  const others = rows.map(cells => wrap('tr', '', cells.map(cell => element('td', cell))));
  return wrap('div', 'scroll', [wrap('table', '', [headRow, ...others])]);
}

function chips(title, pairs) {
  if (!pairs.length) return [];
  const tokens = pairs.map(([token, value]) => {
    const chip = element('span', visibleText(token));
    chip.title = formatNumber(value);
    return chip;
  });
  return [element('h3', title), wrap('div', 'chips', tokens)];
}

// -------------------------------------------------------------------------------- feature list

const label = feature => feature.label || '(no label)';

function testedScore(feature) {
  const test = feature.detection;
  return test && test.balanced_accuracy !== null ? test.balanced_accuracy : 0;
}

const ORDER = {
  max: feature => -feature.max,
  density: feature => -feature.density,
  score: feature => -(feature.score || 0),
  tested: feature => -testedScore(feature),
  id: feature => Number(feature.id),
  site: feature => feature.site === null ? 99 : feature.site,
};

function matches(feature, words) {
  const text = [feature.id, label(feature), ...feature.classes].join(' ').toLowerCase();
  const site = siteChoice.value;
  return (site === '' || String(feature.site) === site) && words.every(word => text.includes(word));
}

function listEntry(feature) {
  const facts = ['max ' + formatNumber(feature.max), formatNumber(100 * feature.density) + ' %'];
  if (feature.site !== null && data.about.sites.length > 1) facts.push('site ' + feature.site);
  if (feature.score) facts.push('score ' + feature.score);
  if (testedScore(feature)) facts.push('tested ' + formatNumber(testedScore(feature)));
  const link = wrap('a', '', [
    element('strong', feature.id + ' '),
    element('span', label(feature)),
    element('small', facts.join(' · ')),
  ]);
  link.href = '#' + feature.id;
  link.dataset.id = feature.id;
  return link;
}

function showList() {
  const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
  const key = ORDER[byId('order').value];
  shown = data.features.filter(feature => matches(feature, words));
  shown.sort((a, b) => key(a) - key(b) || a.id - b.id);
  listBox.replaceChildren();
  for (const feature of shown) {
    addPart(listBox, 'Feature ' + feature.id, () => [listEntry(feature)]);
  }
  byId('count').textContent = shown.length + ' of ' + data.features.length;
  markCurrent();
}

// Marks the open feature in the list and scrolls to it.
function markCurrent() {
  for (const link of listBox.children) {
    const on = link.dataset.id === current;
    link.classList.toggle('on', on);
    if (!on || !listBox.offsetParent) continue;
    const top = link.offsetTop - listBox.offsetTop;
    const bottom = top + link.offsetHeight;
    const visibleBottom = listBox.scrollTop + listBox.clientHeight;
    if (top < listBox.scrollTop || bottom > visibleBottom) listBox.scrollTop = top - 60;
  }
}

// --------------------------------------------------------------------------------- one feature

function context([words, position, activation, pairs, site, weight, doc]) {
  const strengths = new Map(pairs);
  const top = Math.max(...strengths.values(), activation, 1e-9);
  const facts = ['strength ' + formatNumber(activation)];
  if (site !== null) facts.push('site ' + site);
  if (weight !== 1) facts.push('router ' + formatNumber(weight));
  facts.push('document ' + doc);
  const tokens = words.map((word, i) => {
    const token = element(i === position ? 'b' : 'span', data.words[word]);
    const strength = strengths.get(i);
    if (strength) {
      const opacity = Math.max(0.1, 0.75 * Math.max(0, strength) / top);
      token.style.background = 'rgba(var(--hot),' + opacity + ')';
      token.title = formatNumber(strength);
    }
    return token;
  });
  return wrap('div', 'context', [element('span', facts.join(' · '), 'meta'), ...tokens]);
}

function factsLine(feature) {
  const density = formatNumber(100 * feature.density);
  const facts = ['max ' + formatNumber(feature.max), 'active on ' + density + ' % of samples'];
  if (feature.category) facts.push(feature.category);
  if (feature.score) facts.push('self-rated score ' + feature.score + '/5');
  for (const kind of ['detection', 'fuzzing']) {
    const test = feature[kind];
    if (test && test.balanced_accuracy !== null) {
      facts.push(kind + ' ' + formatNumber(test.balanced_accuracy) + ' (n ' + test.n + ')');
    }
  }
  return [element('p', facts.join(' · '), 'soft')];
}

function siteBars(feature) {
  const title = feature.norms ? 'Decoder norm by site' : 'Activations by site';
  const sites = data.about.sites;
  const chart = bars(feature.sites, sites, sites.map(site => 'site ' + site));
  return [wrap('div', '', [element('h3', title), chart])];
}

function strengthBars(histogram) {
  const { from, to, counts, n } = histogram;
  const edge = i => formatNumber(from + (to - from) * i / counts.length);
  const names = counts.map((_, i) => i % 3 ? '' : edge(i));
  const titles = counts.map((_, i) => edge(i) + ' to ' + edge(i + 1));
  const title = element('h3', 'Strength, a uniform sample of ' + n);
  return [wrap('div', '', [title, bars(counts, names, titles)])];
}

function removalEffect(feature) {
  const nats = formatNumber(feature.effect_KL);
  return [
    element('h3', 'Removing it changes the next token by ' + nats + ' nats (KL)'),
    ...chips('less likely without it', feature.effect_promoted),
    ...chips('more likely without it', feature.effect_suppressed),
  ];
}

function contextList(title, contexts) {
  const parts = document.createDocumentFragment();
  parts.append(element('h3', title));
  for (const one of contexts) addPart(parts, 'A context', () => [context(one)]);
  return [parts];
}

function quarterOfSample(feature, quarter) {
  const contexts = feature.others.filter(one => one[7] === quarter);
  if (!contexts.length) return [];
  return contextList('A sample of its activations, ' + QUARTERS[quarter - 1], contexts);
}

function showFeature(id) {
  const feature = data.features.find(candidate => candidate.id === id);
  current = id;
  if (!feature) {
    view.replaceChildren(element('p', 'No feature ' + id + ' on this page'));
    markCurrent();
    return;
  }
  view.replaceChildren(element('h2', 'Feature ' + feature.id), element('p', label(feature)));
  addPart(view, 'The summary', () => factsLine(feature));
  const charts = element('div', undefined, 'pair');
  view.append(charts);
  if (feature.sites) addPart(charts, 'The chart by site', () => siteBars(feature));
  if (feature.histogram) addPart(charts, 'The histogram', () => strengthBars(feature.histogram));
  addPart(view, 'The decoder direction', () => [
    ...chips('Its decoder direction promotes', feature.promoted),
    ...chips('and suppresses', feature.suppressed),
  ]);
  if (feature.effect_KL !== null) addPart(view, 'The effect', () => removalEffect(feature));
  addPart(view, 'The contexts', () => contextList('Strongest contexts', feature.contexts));
  QUARTERS.forEach((_, i) => {
    addPart(view, 'A quarter of the sample', () => quarterOfSample(feature, i + 1));
  });
  markCurrent();
  scrollTo(0, 0);
}

// ------------------------------------------------------------------------------------ overview

function siteShares() {
  const sites = data.about.sites;
  const percent = data.routing.share.map(share => 100 * share);
  const titles = sites.map(site => 'site ' + site + ', % of tokens');
  return [element('h3', 'Share of tokens by site'), bars(percent, sites, titles)];
}

// One row for each token of the sample, one cell for each site; the darker, the more weight.
function routerMap() {
  const sites = data.about.sites;
  const sample = data.routing.sample;
  const head = wrap('tr', '', ['', ...sites].map(cell => element('th', cell)));
  const rows = sample.tokens.map((token, i) => {
    const cells = sample.weights[i].map((weight, j) => {
      const cell = element('td');
      cell.style.background = 'rgba(var(--hot),' + weight + ')';
      cell.title = 'site ' + sites[j] + ': ' + formatNumber(weight);
      return cell;
    });
    return wrap('tr', '', [element('td', visibleText(token)), ...cells]);
  });
  return [
    element('h3', 'Router weight of each token of a sample, by site'),
    wrap('div', 'scroll tall', [wrap('table', 'map', [head, ...rows])]),
  ];
}

function evaluationTable() {
  if (!data.evaluation.length) return [];
  const rows = data.evaluation.map(
    result => [result.title, result.split ?? '', (result.tokens ?? '').toLocaleString('en'),
      ...data.metrics.map(key => formatNumber(result[key]))]);
  const note = 'Rows compare only if they have the same split and number of tokens.';
  return [element('h3', 'Evaluation'),
    table(['SAE', 'split', 'tokens', ...data.metrics], rows), element('p', note)];
}

function comparisonPicture() {
  const image = element('img');
  image.alt = 'Comparison of the evaluated SAEs';
  image.src = data.picture;
  return [element('h3', 'Comparison'), image];
}

function showOverview() {
  current = null;
  view.replaceChildren(
    element('h2', data.about.title), element('p', data.about.line, 'soft'));
  if (data.routing) {
    addPart(view, 'The shares of the sites', siteShares);
    addPart(view, 'The router weights', routerMap);
  }
  addPart(view, 'The evaluation', evaluationTable);
  if (data.picture) addPart(view, 'The comparison', comparisonPicture);
  view.append(element('p', HELP, 'soft'));
  markCurrent();
}

// ---------------------------------------------------------------------------------- navigation

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
  if (event.target === query || event.target.tagName === 'SELECT') {
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

function fillSiteChoice() {
  const sites = data.about.sites;
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

query.addEventListener('input', showList);
byId('order').addEventListener('change', showList);
siteChoice.addEventListener('change', showList);
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
