'use strict';
// Small elements that all parts use. All texts are set by textContent, so that none becomes
// markup. A part that fails says so in its place and leaves the rest of the page as it is.

const byId = id => document.getElementById(id);
const data = JSON.parse(byId('data').textContent);
data.features = data.features.rows.map(
  row => Object.fromEntries(data.features.keys.map((key, i) => [key, row[i]])));
const sites = data.about.sites;
const featureById = new Map(data.features.map(feature => [feature.id, feature]));

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

function button(text, className, onClick) {
  const node = element('button', text, className);
  node.type = 'button';
  node.addEventListener('click', onClick);
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

// A share as readers of tables write it: .83, 1.
const formatShare = x => x.toFixed(2).replace(/^0\./, '.').replace(/\.00$/, '');

// A token in one line: signs for line ends and tabs, codes for other control characters.
function visibleText(token) {
  return token.replaceAll('\n', '⏎').replaceAll('\t', '⇥')
    .replace(/[\u0000-\u001f\u007f-\u009f\u2028\u2029]/g, c => JSON.stringify(c).slice(1, -1));
}

// "red,green,blue" of a site.
const siteColour = site => data.about.colours[site].join(',');

function siteMark(site) {
  const mark = element('span', site, 'site');
  mark.style.setProperty('--site', siteColour(site));
  mark.title = 'site ' + site;
  return mark;
}

// Bars of 70 pixels at most. options: colour(i) of each; line, a value at which a line is drawn.
function bars(values, names, titles, options = {}) {
  const top = Math.max(...values, options.line ?? 0, 1e-12);
  const chart = wrap('div', 'bars', values.map((value, i) => {
    const bar = element('i');
    bar.style.height = 70 * Math.max(0, value) / top + 'px';
    if (options.colour) bar.style.background = 'rgb(' + options.colour(i) + ')';
    const column = wrap('div', '', [bar, element('span', String(names[i]))]);
    column.title = titles[i] + ': ' + formatNumber(value);
    return column;
  }));
  if (options.line !== undefined) {
    const line = element('hr');
    line.style.bottom = 17 + 70 * options.line / top + 'px';
    chart.append(line);
  }
  return chart;
}

// One bar for each site. options: those of bars(); sites, if they are not those of the page.
function siteBars(values, what, options = {}) {
  const own = options.sites ?? sites;
  const every = Math.ceil(own.length / 17); // so that the numbers do not touch
  const names = own.map((site, i) => i % every ? '' : site);
  const titles = own.map(site => 'site ' + site + ', ' + what);
  return bars(values, names, titles, { colour: i => siteColour(own[i]), ...options });
}

function chart(title, parts) {
  return wrap('div', '', [element('h3', title), ...parts]);
}

function table(head, rows) {
  const headRow = wrap('tr', '', head.map(cell => element('th', cell)));
  const others = rows.map(cells => wrap('tr', '', cells.map(cell => element('td', cell))));
  return wrap('div', 'scroll', [wrap('table', '', [headRow, ...others])]);
}

// ------------------------------------------------------------------------ features as links

const LABEL_CHARS = 80; // of a label in a list

// The label in a list: of a rule the first conditions, and the number of the others.
function labelOf(feature) {
  const text = feature.short ?? feature.label;
  if (!text) return '(no label)';
  const start = text.length > LABEL_CHARS ? text.slice(0, LABEL_CHARS) + '…' : text;
  return feature.more ? start + '; and ' + feature.more + ' more' : start;
}

// A link to a feature, with its site, its label and a fact about it. A latent without contexts
// has only its number.
function featureLink(id, fact) {
  const feature = featureById.get(String(id));
  const parts = [element('strong', id)];
  if (feature && feature.site !== null && sites.length > 1) parts.push(siteMark(feature.site));
  const label = element('span', feature ? labelOf(feature) : 'no contexts', 'label');
  if (feature?.label) label.title = feature.label;
  parts.push(label);
  if (fact !== undefined) parts.push(element('small', fact));
  const link = wrap('a', 'feature', parts);
  link.href = '#' + id;
  return link;
}

// ------------------------------------------------------------------------ tokens in a text

// The tokens of a text as buttons, coloured by site where sites are given. onPick(index) is
// called when one is chosen.
function tokenStrip(tokens, siteOfToken, onPick) {
  const buttons = tokens.map((token, i) => {
    const node = button(visibleText(token), 'token', () => pick(i));
    const site = siteOfToken && siteOfToken[i];
    if (site !== null && site !== undefined && site !== false) {
      node.style.setProperty('--site', siteColour(site));
      node.title = 'site ' + site;
    }
    return node;
  });
  const parts = buttons.flatMap((node, i) => tokens[i].includes('\n') ? [node, element('br')] : node);
  function pick(index) {
    buttons.forEach((node, i) => node.classList.toggle('on', i === index));
    onPick(index);
  }
  return { box: wrap('div', 'strip', parts), pick };
}

function siteLegend(own = sites) {
  return wrap('p', 'legend soft', ['site ', ...own.map(siteMark)]);
}
