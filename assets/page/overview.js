// The overview: sites, features and a sample of the text.

// ------------------------------------------------------------------------ a sample of the text

// What was read at one token: the router's weights and the strongest features.
function tokenPanel(token, weights, strongest) {
  const parts = [wrap('p', '', ['Token ', element('b', visibleText(token), 'chip')])];
  if (weights) {
    const site = sites[weights.indexOf(Math.max(...weights))];
    parts[0].append(' read at site ', siteMark(site));
    parts.push(siteBars(weights, 'weight of the router'));
  }
  for (const [id, value] of strongest) parts.push(featureLink(id, formatNumber(value)));
  return parts;
}

function textSample() {
  const { tokens, strongest } = data.sample ?? { tokens: data.routing.sample.tokens };
  const weights = data.routing?.sample.weights;
  const siteOfToken = weights && weights.map(row => sites[row.indexOf(Math.max(...row))]);
  const panel = element('div', undefined, 'panel');
  const rows = weights ? weightMap(tokens, weights, i => strip.pick(i)) : null;
  const strip = tokenStrip(tokens, siteOfToken, i => {
    panel.replaceChildren();
    addPart(panel, 'The token', () => tokenPanel(tokens[i], weights?.[i], strongest?.[i] ?? []));
    rows?.select(i);
  });
  const title = weights ? 'Where the router reads each token of a sample; choose one'
    : 'A sample of the text; choose a token to see its features';
  const parts = [element('h3', title)];
  if (weights) parts.push(siteLegend());
  parts.push(wrap('div', 'pair', [wrap('div', '', [strip.box, panel]), ...(rows ? [rows.box] : [])]));
  const firstLong = tokens.findIndex(token => token.trim().length > 4);
  if (tokens.length) strip.pick(Math.max(0, firstLong));
  return parts;
}

// One row for each token, one cell for each site; the darker, the more weight.
function weightMap(tokens, weights, onPick) {
  const head = wrap('tr', '', ['', ...sites].map(cell => element('th', cell)));
  const rows = tokens.map((token, i) => {
    const cells = sites.map((site, j) => {
      const cell = element('td');
      cell.style.background = 'rgba(var(--hot),' + weights[i][j] + ')';
      cell.title = 'site ' + site + ': ' + formatNumber(weights[i][j]);
      return cell;
    });
    const row = wrap('tr', '', [element('td', visibleText(token)), ...cells]);
    row.addEventListener('click', () => onPick(i));
    return row;
  });
  const box = wrap('div', 'scroll tall', [wrap('table', 'map', [head, ...rows])]);
  const select = index => {
    rows.forEach((row, i) => row.classList.toggle('on', i === index));
    const { offsetTop } = rows[index];
    const isVisible = offsetTop > box.scrollTop + 20 && offsetTop < box.scrollTop + box.clientHeight;
    if (!isVisible) box.scrollTop = Math.max(0, offsetTop - 60);
  };
  return { box, select };
}

// --------------------------------------------------------------------- sites and densities

function siteShares() {
  const percent = data.routing.share.map(share => 100 * share);
  return [chart('Share of tokens by site, %', [siteBars(percent, '% of tokens')])];
}

function featuresBySite() {
  const counts = sites.map(site => data.features.filter(feature => feature.site === site).length);
  const rule = data.features.some(feature => feature.norms) ? 'the largest decoder norm'
    : 'most of their activations';
  return [chart('Features by the site of ' + rule, [siteBars(counts, 'features')])];
}

function densityBars() {
  const { from, counts, silent } = data.densities;
  const power = i => Math.abs(i % 4) ? '' : '10' + superscript(i / 4);
  const edge = i => formatNumber(100 * 10 ** (i / 4)) + ' %';
  const names = counts.map((_, i) => power(from + i));
  const titles = counts.map((_, i) => edge(from + i) + ' to ' + edge(from + i + 1));
  const title = 'Density of all latents; ' + silent + ' never active';
  return [chart(title, [bars(counts, names, titles)])];
}

function superscript(n) {
  return String(n).replace(/[-0-9]/g, c => c === '-' ? '⁻' : '⁰¹²³⁴⁵⁶⁷⁸⁹'[c]);
}

// ------------------------------------------------------------------- map of sites and features

// One column for each feature, one row for each site: the share of its activations, or of its
// decoder norm, against the largest. Features are ordered by the mean site.
function featureMap() {
  const columns = data.features.map(feature => ({ feature, values: feature.counts ?? feature.norms }))
    .filter(({ values }) => values);
  if (!columns.length) return [];
  for (const column of columns) {
    const total = column.values.reduce((sum, value) => sum + value, 0) || 1;
    column.top = Math.max(...column.values, 1e-12);
    column.mean = column.values.reduce((sum, value, i) => sum + value * i, 0) / total;
  }
  columns.sort((a, b) => a.mean - b.mean);
  const canvas = element('canvas', undefined, 'features');
  const caption = element('p', 'Point at a feature to see it, choose it to open it.', 'soft');
  drawMap(canvas, columns);
  const columnAt = event => {
    const { left, width } = canvas.getBoundingClientRect();
    const index = Math.floor(columns.length * (event.clientX - left) / width);
    return columns[Math.min(columns.length - 1, Math.max(0, index))].feature;
  };
  canvas.addEventListener('pointermove', event => {
    const feature = columnAt(event);
    caption.replaceChildren(featureLink(feature.id));
  });
  canvas.addEventListener('click', event => { location.hash = columnAt(event).id; });
  const names = wrap('div', 'names', sites.map(site => element('span', site)));
  return [
    element('h3', 'Site by feature: where each of ' + columns.length + ' features is active'),
    wrap('div', 'site-map', [names, canvas]), caption];
}

function drawMap(canvas, columns) {
  canvas.width = columns.length;
  canvas.height = sites.length;
  canvas.style.height = 11 * sites.length + 'px';
  const style = getComputedStyle(document.documentElement);
  const hot = style.getPropertyValue('--hot').split(',').map(Number);
  const image = new ImageData(canvas.width, canvas.height);
  columns.forEach(({ values, top }, x) => values.forEach((value, y) => {
    image.data.set([...hot, Math.round(255 * value / top)], 4 * (y * canvas.width + x));
  }));
  canvas.getContext('2d').putImageData(image, 0, 0);
}

// ------------------------------------------------------------------------------- evaluation

function evaluationTable() {
  if (!data.evaluation.length) return [];
  const metrics = data.metrics.filter(
    key => data.evaluation.some(result => (result[key] ?? null) !== null));
  const rows = data.evaluation.map(
    result => [result.title, result.split ?? '', (result.tokens ?? '').toLocaleString('en'),
      ...metrics.map(key => formatNumber(result[key]))]);
  const note = 'Rows compare only if they have the same split and number of tokens.';
  return [element('h3', 'Evaluation'),
    table(['SAE', 'split', 'tokens', ...metrics], rows), element('p', note)];
}

function comparisonPicture() {
  const image = element('img');
  image.alt = 'Comparison of the evaluated SAEs';
  image.src = data.picture;
  return [element('h3', 'Comparison'), image];
}

// ------------------------------------------------------------------------------ the overview

// Parts that another script puts first: {name, build()}.
const FIRST_PARTS = [];

function showOverview() {
  current = null;
  view.replaceChildren(
    element('h2', data.about.title + ' on ' + data.about.language_model),
    element('p', data.about.line, 'soft'));
  for (const part of FIRST_PARTS) addPart(view, part.name, part.build);
  if (data.sample || data.routing) addPart(view, 'The sample', textSample);
  const charts = element('div', undefined, 'pair');
  view.append(charts);
  if (data.routing) addPart(charts, 'The shares of the sites', siteShares);
  if (sites.length > 1) addPart(charts, 'The features by site', featuresBySite);
  if (data.densities) addPart(charts, 'The densities', densityBars);
  if (sites.length > 1) addPart(view, 'The map of features', featureMap);
  addPart(view, 'The evaluation', evaluationTable);
  if (data.picture) addPart(view, 'The comparison', comparisonPicture);
  view.append(element('p', HELP, 'soft'));
  document.title = pageTitle;
  markCurrent();
}
