// The card of one feature.

const QUARTERS = ['strongest quarter', 'second quarter', 'third quarter', 'weakest quarter'];
const BEFORE = 16; // tokens before the active one in a line
const AFTER = 28; // and after it

// ------------------------------------------------------------------------------- its contexts

// Tokens first ... end - 1 of a context. Active ones are shaded on the scale of the feature, so
// that weak activations look weak; `sign` makes the text of a token.
function shadedTokens(context, feature, first, end, sign) {
  const parts = [];
  for (let i = first; i < end; i += 1) {
    const strength = context.strengths.get(i);
    const text = sign(context.words[i], strength !== undefined);
    if (strength === undefined) {
      if (typeof parts.at(-1) === 'string') parts.push(parts.pop() + text);
      else parts.push(text);
      continue;
    }
    const token = element(i === context.position ? 'b' : 'span', text);
    const share = Math.min(1, Math.max(0, strength) / feature.max);
    token.style.background = 'rgba(var(--hot),' + (0.05 + 0.85 * share).toFixed(3) + ')';
    token.title = formatNumber(strength);
    parts.push(token);
  }
  return parts;
}

const inOneLine = token => visibleText(token);
// In a whole text, only an active line end needs a sign.
const inFull = (token, isActive) => isActive ? token.replaceAll('\n', '⏎\n') : token;

function readContext([start, length, position, pairs, site, weight]) {
  const numbers = data.passages.slice(start, start + length);
  const strengths = new Map();
  for (let i = 0; i < pairs.length; i += 2) strengths.set(pairs[i], pairs[i + 1]);
  const words = numbers.map(number => data.words[number]);
  return { words, position, activation: pairs[1], strengths, site, weight };
}

// One line with the active token in its middle; the whole text when it is opened.
function contextBox(raw, feature) {
  const context = readContext(raw);
  const { words, position } = context;
  const tokens = (first, end, sign) => shadedTokens(context, feature, first, end, sign);
  const line = wrap('span', 'line', [
    wrap('span', 'before', [
      wrap('span', '', tokens(Math.max(0, position - BEFORE), position, inOneLine))]),
    ...tokens(position, position + 1, inOneLine),
    wrap('span', 'after', tokens(
      position + 1, Math.min(words.length, position + AFTER), inOneLine)),
  ]);
  const summary = wrap('summary', '', [element('small', formatNumber(context.activation)), line]);
  if (context.site !== null && sites.length > 1) summary.append(siteMark(context.site));
  const box = wrap('details', 'context', [summary]);
  box.addEventListener('toggle', () => {
    if (box.children.length > 1) return;
    const facts = ['strength ' + formatNumber(context.activation)];
    if (context.site !== null) facts.push('site ' + context.site);
    if (context.weight !== 1) facts.push('router ' + formatNumber(context.weight));
    box.append(
      element('small', facts.join(' · ')),
      wrap('p', 'full', tokens(0, words.length, inFull)));
  });
  return box;
}

function contextList(title, contexts, feature) {
  const parts = document.createDocumentFragment();
  parts.append(element('h3', title));
  for (const one of contexts) addPart(parts, 'A context', () => [contextBox(one, feature)]);
  return [parts];
}

function quarterOfSample(feature, quarter) {
  const contexts = feature.others.filter(one => one[6] === quarter);
  if (!contexts.length) return [];
  const title = 'A sample of its activations, ' + QUARTERS[quarter - 1];
  return contextList(title, contexts, feature);
}

// ------------------------------------------------------------------------------- its numbers

function badge(text, title) {
  const node = element('span', text, 'badge');
  if (title) node.title = title;
  return node;
}

// The first conditions of a rule; the whole of it when the rest is asked for.
function labelText(feature) {
  const text = element('span', feature.short ?? feature.label ?? '(no label)', feature.ruled ? '' : 'soft');
  if (feature.short === null) return [text];
  const rest = button(feature.more ? 'and ' + feature.more + ' more' : 'examples', 'rest', () => {
    text.textContent = feature.label;
    rest.remove();
  });
  return [text, ' ', rest];
}

function labelLine(feature) {
  const parts = labelText(feature);
  if (feature.engine) parts.push(badge(feature.engine, 'where the label comes from'));
  const balanced = 'balanced accuracy of the whole label on texts that it was not made from; chance is .5';
  for (const [kind, name] of [['detection', 'tested'], ['fuzzing', 'fuzzing']]) {
    const test = feature[kind];
    if (!test) continue;
    const [accuracy, count] = test;
    parts.push(badge(name + ' ' + formatShare(accuracy) + ' of n ' + count, kind + ': ' + balanced));
  }
  if (feature.category) parts.push(badge(feature.category, 'kind of feature'));
  if (feature.score) parts.push(badge('self-rated ' + feature.score + '/5'));
  return [wrap('p', 'label', parts)];
}

function factsLine(feature) {
  const density = formatNumber(100 * feature.density);
  const facts = ['largest activation ' + formatNumber(feature.max), 'active on ' + density + ' %'];
  if (feature.site !== null && sites.length > 1) facts.push('most at site ' + feature.site);
  return [element('p', facts.join(' · '), 'soft')];
}

function bySite(feature) {
  const parts = [];
  if (feature.counts) {
    const total = feature.counts.reduce((sum, count) => sum + count, 0) || 1;
    const share = data.routing?.share;
    const ratios = feature.counts.map((count, i) => {
      if (!share) return count / total;
      return share[i] ? count / total / share[i] : 0;
    });
    const title = share ? 'Activations by site, over the site’s share of tokens'
      : 'Share of its activations by site';
    const options = share ? { line: 1 } : {};
    parts.push(chart(title, [siteBars(ratios, 'times its share of tokens', options)]));
  }
  if (feature.strengths) {
    parts.push(chart('Mean strength by site', [siteBars(feature.strengths, 'mean strength')]));
  }
  if (feature.norms) {
    parts.push(chart('Decoder norm by site', [siteBars(feature.norms, 'decoder norm')]));
  }
  return parts;
}

function binBars({ from, to, counts }, format) {
  const edge = i => formatNumber(from + (to - from) * i / counts.length);
  const every = Math.ceil(counts.length / 4);
  const names = counts.map((_, i) => i % every ? '' : edge(i));
  const titles = counts.map((_, i) => edge(i) + ' to ' + edge(i + 1));
  return bars(counts.map(format), names, titles);
}

function strengthBars(histogram) {
  return [chart('Strength, a uniform sample of ' + histogram.n, [binBars(histogram, n => n)])];
}

// The counts go over four powers of ten, so that their logarithm is drawn.
function logitBars(histogram) {
  const title = 'What it adds to the logits (tokens, log scale)';
  return [chart(title, [binBars(histogram, n => Math.log10(1 + n))])];
}

function chips(title, pairs) {
  if (!pairs.length) return [];
  const tokens = pairs.map(([number, value]) => wrap('span', '', [
    visibleText(data.words[number]), element('small', formatNumber(value))]));
  return [element('h3', title), wrap('div', 'chips', tokens)];
}

function removalEffect(feature) {
  const nats = formatNumber(feature.effect_KL);
  return [
    element('h3', 'Removing it changes the next token by ' + nats + ' nats (KL)'),
    ...chips('less likely without it', feature.effect_promoted),
    ...chips('more likely without it', feature.effect_suppressed),
  ];
}

function relatives(title, pairs, fact) {
  if (!pairs.length) return [];
  return [wrap('div', 'relatives', [
    element('h3', title), ...pairs.map(([id, value]) => featureLink(id, fact(value)))])];
}

function partnersOf(feature) {
  const percent = value => formatNumber(100 * value) + ' %';
  return relatives('Active on the same tokens (share of its own)', feature.partners, percent);
}

// ---------------------------------------------------------------------------------- the card

function showFeature(id) {
  const feature = featureById.get(id);
  current = id;
  if (!feature) {
    view.replaceChildren(element('p', 'No feature ' + id + ' on this page'));
    for (const part of CARD_PARTS) addPart(view, part.name, () => part.build({ id }));
    markCurrent();
    return;
  }
  view.replaceChildren(element('h2', 'Feature ' + feature.id));
  addPart(view, 'The label', () => labelLine(feature));
  addPart(view, 'The summary', () => factsLine(feature));
  for (const part of CARD_PARTS) addPart(view, part.name, () => part.build(feature));
  const charts = element('div', undefined, 'pair');
  view.append(charts);
  addPart(charts, 'The charts by site', () => bySite(feature));
  if (feature.histogram) addPart(charts, 'The histogram', () => strengthBars(feature.histogram));
  if (feature.logits) addPart(charts, 'The logits', () => logitBars(feature.logits));
  addPart(view, 'The decoder direction', () => [
    ...chips('Its decoder direction promotes', feature.promoted),
    ...chips('and suppresses', feature.suppressed),
  ]);
  if (feature.effect_KL !== null) addPart(view, 'The effect', () => removalEffect(feature));
  addPart(view, 'The contexts', () => contextList('Strongest contexts', feature.contexts, feature));
  const others = element('div', undefined, 'pair');
  addPart(others, 'The nearest features', () => relatives(
    'Nearest decoder directions (cosine)', feature.nearest, formatNumber));
  addPart(others, 'The co-active features', () => partnersOf(feature));
  view.append(others);
  QUARTERS.forEach((_, i) => {
    addPart(view, 'A quarter of the sample', () => quarterOfSample(feature, i + 1));
  });
  document.title = 'Feature ' + feature.id + ' · ' + pageTitle;
  markCurrent();
  scrollTo(0, 0);
}

// Parts that another script adds to each card: {name, build(feature)}. A latent that is not on
// the page has only its id.
const CARD_PARTS = [];
