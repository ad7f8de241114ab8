// The box of explore.py: a text of the reader's own, what the SAEs read in it, and how it goes
// on while a feature is edited. Only this server is asked, at addresses below its own.

const PAUSE = 300; // milliseconds without a key, after which the text is read
const RETRY = 1000; // milliseconds, after which a busy language model is asked again
const KIND_NAMES = { set: 'hold at', add: 'add', zero: 'switch off' };
const STARTING_TEXT = 'The war began because the people wanted';

const typed = element('textarea');
typed.rows = 2;
typed.id = 'typed';
typed.setAttribute('aria-label', 'a text of your own');
typed.maxLength = 4000;
typed.value = STARTING_TEXT;
const readings = element('div', undefined, 'readings');
const liveNote = element('p', '', 'soft');
liveNote.id = 'live-note';
liveNote.setAttribute('role', 'status');

function sleep(milliseconds) {
  return new Promise(resolve => setTimeout(resolve, milliseconds));
}

// Sends a request. While the language model is busy, it is sent again.
async function ask(what, body, signal) {
  for (;;) {
    const response = await fetch(what, {
      method: 'POST', signal, headers: { 'Content-Type': 'application/json' },
      body: JSON.stringify(body),
    });
    if (response.ok) return response;
    const { error, busy } = await response.json();
    if (!busy) throw new Error(error);
    liveNote.textContent = 'The language model is busy; waiting.';
    await sleep(RETRY);
    if (signal.aborted) throw new DOMException('', 'AbortError');
  }
}

// Runs a task of which only the last one counts: the one before is given up.
function lastOnly(task) {
  let running = null;
  return async () => {
    running?.abort();
    running = new AbortController();
    const { signal } = running;
    try {
      await task(signal);
    } catch (error) {
      if (signal.aborted) return;
      liveNote.textContent = error instanceof TypeError
        ? 'The server does not answer; is explore.py still running?' : error.message;
    }
  };
}

// --------------------------------------------------------------------------------- reading

let textRead = null; // the text whose reading is shown

const readText = lastOnly(async signal => {
  liveNote.textContent = 'Reading …';
  const text = typed.value;
  const response = await ask('read', { text }, signal);
  const { tokens, saes } = await response.json();
  liveNote.textContent = 'Choose a token to see its strongest features.';
  readings.replaceChildren();
  textRead = text;
  saes.forEach((reading, i) => {
    addPart(readings, data.live.saes[i].title, () => oneReading(tokens, reading, i));
  });
});

// A link to a feature of any of the SAEs. Another SAE's card is on its own page.
function linkInto(index, id, label, fact) {
  const link = featureLink(id, fact);
  if (index !== data.live.current) {
    link.href = '?sae=' + index + '#' + id;
    link.querySelector('.label').textContent = label ?? '(no label)';
    link.querySelector('.site')?.remove();
  }
  return link;
}

function oneReading(tokens, reading, index) {
  const sae = data.live.saes[index];
  const panel = element('div', undefined, 'panel');
  const strip = tokenStrip(tokens, reading.sites, i => {
    const head = wrap('p', '', ['Token ', element('b', visibleText(tokens[i]), 'chip')]);
    const parts = [head];
    if (reading.weights) {
      head.append(' read at site ', siteMark(reading.sites[i]));
      parts.push(siteBars(reading.weights[i], 'weight of the router', { sites: sae.sites }));
    }
    for (const [id, strength] of reading.strongest[i]) {
      parts.push(linkInto(index, id, reading.labels[id], formatNumber(strength)));
    }
    panel.replaceChildren(...parts);
  });
  strip.pick(tokens.length - 1);
  if (index === data.live.current) {
    for (const [id, strength] of reading.strongest.flat()) {
      largestSeen.set(id, Math.max(strength, largestSeen.get(id) ?? 0));
    }
  }
  const facts = sae.title + ' · NormMSE ' + formatNumber(reading.NormMSE);
  const parts = [element('h4', facts)];
  if (reading.sites) parts.push(siteLegend(sae.sites));
  return [wrap('div', '', [...parts, strip.box, panel])];
}

let pause = null;

typed.addEventListener('input', () => {
  clearTimeout(pause);
  pause = setTimeout(() => (steerText ?? readText)(), PAUSE);
});

FIRST_PARTS.push({
  name: 'The box',
  build: () => {
    steerText = null;
    if (textRead !== typed.value) readText();
    return [wrap('div', 'live', [
      element('h3', 'A text of your own'), typed, liveNote, readings])];
  },
});

// -------------------------------------------------------------------------------- steering

const largestSeen = new Map(); // strength of the latents of this page's SAE in the texts so far
let steerText = null; // continues the text with the feature of the open card edited

// The slider ends at twice the largest activation that is known.
function steering(feature) {
  const most = 2 * (feature.max ?? largestSeen.get(Number(feature.id)) ?? 1);
  const kind = element('select');
  kind.id = 'kind';
  kind.setAttribute('aria-label', 'what to do with the feature');
  for (const [value, name] of Object.entries(KIND_NAMES)) {
    const option = element('option', name);
    option.value = value;
    kind.append(option);
  }
  const slider = element('input');
  Object.assign(slider, { type: 'range', id: 'strength', min: 0, max: 100, value: 50 });
  slider.setAttribute('aria-label', 'strength');
  const amount = element('output', formatNumber(most / 2));
  const asIs = element('p', '', 'written');
  const steered = element('p', '', 'written');
  steered.id = 'steered';
  asIs.id = 'as-is';
  const value = () => Number((most * slider.value / 100).toPrecision(3));
  const edit = () => kind.value === 'zero' ? ['set', Number(feature.id), 0]
    : [kind.value, Number(feature.id), value()];
  const run = lastOnly(async signal => {
    amount.textContent = kind.value === 'zero' ? '0' : formatNumber(value());
    slider.disabled = kind.value === 'zero';
    liveNote.textContent = 'Writing …';
    const request = { sae: data.live.current, text: typed.value, edits: [edit()] };
    for await (const step of steps(request, signal)) {
      asIs.textContent = step.as_is;
      steered.textContent = step.steered;
    }
    liveNote.textContent = '';
  });
  slider.addEventListener('input', run);
  kind.addEventListener('change', run);
  steerText = run;
  const controls = wrap('p', 'controls', [kind, slider, amount, button('write', '', run)]);
  const column = (title, node) => wrap('div', '', [element('h4', title), node]);
  return [wrap('div', 'live', [
    element('h3', 'Steer a text with it'), typed, controls, liveNote,
    wrap('div', 'pair', [column('as it is', asIs), column('steered', steered)])])];
}

// The lines of an answer, as they come.
async function* steps(request, signal) {
  for (;;) {
    const response = await ask('steer', request, signal);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = '';
    let busy = false;
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (text + value).split('\n');
      text = lines.pop();
      for (const line of lines) {
        const step = JSON.parse(line);
        if (step.error && !step.busy) throw new Error(step.error);
        busy = Boolean(step.busy);
        if (!busy) yield step;
      }
    }
    if (!busy) return;
    liveNote.textContent = 'The language model is busy; waiting.';
    await sleep(RETRY);
    if (signal.aborted) return;
  }
}

CARD_PARTS.push({ name: 'Steering', build: steering });
