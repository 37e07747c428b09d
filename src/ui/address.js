// What the page shows is in its address, so that it survives a reload, can be
// sent to others, and "back" works: filters and pages in the query, the chosen
// function in the fragment.

const NAMES = ["filter", "page", "state", "function", "after"];

export function read() {
  const query = new URLSearchParams(location.search);
  return Object.fromEntries(NAMES.map((name) => [name, query.get(name) ?? ""]));
}

// The cursors of the newer pages of queued calls, newest first; "" is the first page.
export const trail = () => history.state?.trail ?? [];

// Sets some of the names; an empty value removes one. `push`: "back" leads to
// where the page is now.
export function write(changes, { push = false, newer = trail() } = {}) {
  const query = new URLSearchParams(location.search);
  for (const [name, value] of Object.entries(changes)) {
    if (value) query.set(name, value);
    else query.delete(name);
  }
  const search = query.size ? `?${query}` : "";
  const address = `${location.pathname}${search}${location.hash}`;
  history[push ? "pushState" : "replaceState"]({ trail: newer }, "", address);
}

export function readSelected() {
  try { return decodeURIComponent(location.hash.slice(1)); } catch { return ""; }
}

export function writeSelected(key) {
  history.replaceState(history.state, "", `${location.search}#${encodeURIComponent(key)}`);
}
