// Asks the gateway again and again, and says how old what is shown is.

import { asList, setLines, setText, timeText, ui } from "./dom.js";

const POLL_MS = 2000;
const RETRY_MAX_MS = 10_000;
const TIMEOUT_MS = 10_000;
const SLOW_TURNS = 15; // version and namespaces are asked once in this number of polls

// The API lies beside /ui/, also when a proxy serves both under a prefix.
// fetch refuses URLs with a login inside, which the page's own may have.
export const root = new URL("../", import.meta.url);
root.username = root.password = "";

export const ask = (path, options = {}) =>
  fetch(new URL(path, root), { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS), ...options });

// The JSON of a 2xx response. Otherwise an error, with the status and the
// first line of the body; without a status when there was no response.
export async function askJson(path) {
  const response = await ask(path);
  if (response.ok) return response.json();
  const text = (await response.text()).split("\n")[0].slice(0, 300);
  throw Object.assign(new Error(text || `status ${response.status}`), { status: response.status });
}

let hurry = false;
let endSleep = () => {};

function sleep(ms) {
  if (hurry) return undefined;
  return new Promise((done) => {
    const timer = setTimeout(done, ms);
    endSleep = () => { clearTimeout(timer); done(); };
  });
}

// Makes the next poll start at once, or right after the one under way.
export function wake() {
  hurry = true;
  endSleep();
}

const shown = () =>
  new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));

// A part of the page that is kept up to date: its element, when it was last,
// and what asks for it.
export const part = (node, update) => ({ node, update, at: 0 });

function markOld({ node, at }, old) {
  if (old) node.dataset.old = at ? `since ${timeText(at)}` : "never";
  else delete node.dataset.old;
}

// One loop asks everything, one request after the other, so that no two
// polls can overlap however slow the gateway is.
export async function pollForever(parts, slowly) {
  let wait = POLL_MS;
  for (let turn = 0; ; ) {
    while (document.hidden) await shown();
    hurry = false;
    const trouble = await pollOnce(parts, turn % SLOW_TURNS === 0 ? slowly : []);
    if (trouble) {
      wait = turn === 0 ? Math.min(wait * 2, RETRY_MAX_MS) : POLL_MS;
      turn = 0; // it may come back as another version
      showTrouble(trouble, parts, wait);
    } else {
      turn += 1;
      wait = POLL_MS;
      ui.trouble.hidden = true;
    }
    await sleep(wait);
  }
}

// The first trouble there was, if any.
async function pollOnce(parts, slowly) {
  try {
    await pollHealth();
  } catch (error) {
    parts.forEach((each) => markOld(each, true));
    parts.forEach((each) => each.failed?.(error));
    return error;
  }
  // Neither is worth losing the list for.
  for (const { path, show } of slowly) await askJson(path).then(show, () => {});
  let trouble = null;
  for (const each of parts) {
    try {
      await each.update();
      each.at = Date.now();
      markOld(each, false);
    } catch (error) {
      markOld(each, true);
      each.failed?.(error);
      trouble ??= error;
    }
  }
  return trouble;
}

function showTrouble({ status, message }, parts, wait) {
  if (!status) showHealth("unknown", "unreachable", []);
  const what = status ? `Some of this cannot be shown: ${message}.` : "The gateway cannot be reached.";
  const old = parts.filter(({ node }) => node.dataset.old && !node.hidden).map(({ at }) => at);
  const oldest = Math.min(...old);
  const since = oldest > 0 && Number.isFinite(oldest) ? ` What is greyed out is as of ${timeText(oldest)}.` : "";
  setText(ui.troubleText, `${what}${since} Trying again every ${wait / 1000} s.`);
  ui.trouble.hidden = false;
}

async function pollHealth() {
  const response = await ask("_/ready"); // 503 is an answer too
  const state = (await response.json().catch(() => null)) ?? {};
  const reasons = asList(state.reasons).map(String);
  const degraded = asList(state.degraded).map((text) => `degraded: ${text}`);
  if (!response.ok) showHealth("down", "not ready", [...reasons, ...degraded]);
  else if (degraded.length) showHealth("partly", "degraded", [...degraded, ...reasons]);
  else showHealth("up", "ready", []);
}

function showHealth(level, text, reasons) {
  ui.health.dataset.level = level;
  setText(ui.healthText, text);
  setLines(ui.reasons, reasons);
}
