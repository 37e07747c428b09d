// Polls the gateway, and marks parts of the page that are outdated.

import { asList, setLines, setText, timeText, ui } from "./dom.js";

const POLL_MS = 2000;
const RETRY_MAX_MS = 10_000;
const TIMEOUT_MS = 10_000;
const SLOW_POLLS = 15; // version and namespaces are requested once in this number of polls

// The API is at ../ of the page, also behind a proxy that adds a prefix.
// fetch rejects URLs with credentials, which the URL of the page may have.
export const root = new URL("../", import.meta.url);
root.username = root.password = "";

export const ask = (path, options = {}) =>
  fetch(new URL(path, root), { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS), ...options });

// Returns the JSON of a 2xx response. Otherwise throws an error with the status
// and the first line of the body; without a status if there was no response.
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

// Starts the next poll immediately, or right after the current one.
export function wake() {
  hurry = true;
  endSleep();
}

const shown = () =>
  new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));

// A part of the page: its element, the function that updates it, and the time of
// the last successful update.
export const part = (node, update) => ({ node, update, at: 0 });

function setOutdated({ node, at }, outdated) {
  if (outdated) node.dataset.old = at ? `since ${timeText(at)}` : "never";
  else delete node.dataset.old;
}

// One loop sends all requests one after the other, so that polls never overlap,
// however slow the gateway is.
export async function pollForever(parts, slowly) {
  let wait = POLL_MS;
  for (let polls = 0; ; ) {
    while (document.hidden) await shown();
    hurry = false;
    const trouble = await pollOnce(parts, polls % SLOW_POLLS === 0 ? slowly : []);
    if (trouble) {
      wait = polls === 0 ? Math.min(wait * 2, RETRY_MAX_MS) : POLL_MS;
      polls = 0; // it may come back with another version
      showTrouble(trouble, parts, wait);
    } else {
      polls += 1;
      wait = POLL_MS;
      ui.trouble.hidden = true;
    }
    await sleep(wait);
  }
}

// Returns the first error, or null.
async function pollOnce(parts, slowly) {
  try {
    await pollHealth();
  } catch (error) {
    parts.forEach((each) => setOutdated(each, true));
    parts.forEach((each) => each.failed?.(error));
    return error;
  }
  // A failure of these must not hide the list.
  for (const { path, show } of slowly) await askJson(path).then(show, () => {});
  let trouble = null;
  for (const each of parts) {
    try {
      await each.update();
      each.at = Date.now();
      setOutdated(each, false);
    } catch (error) {
      setOutdated(each, true);
      each.failed?.(error);
      trouble ??= error;
    }
  }
  return trouble;
}

function showTrouble({ status, message }, parts, wait) {
  if (!status) showHealth("unknown", "unreachable", []);
  const what = status ? `Part of this page cannot be updated: ${message}.` : "The gateway cannot be reached.";
  const old = parts.filter(({ node }) => node.dataset.old && !node.hidden).map(({ at }) => at);
  const oldest = Math.min(...old);
  const since = oldest > 0 && Number.isFinite(oldest) ? ` Greyed out parts are as of ${timeText(oldest)}.` : "";
  setText(ui.troubleText, `${what}${since} Retrying every ${wait / 1000} s.`);
  ui.trouble.hidden = false;
}

async function pollHealth() {
  const response = await ask("_/ready"); // 503 has the same body
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
