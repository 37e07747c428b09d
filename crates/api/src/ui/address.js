// The address holds the state of the page: filters and page numbers in the query,
// the selected function in the fragment. So a reload keeps the state, a link can
// be shared, and the back button works.

const NAMES = ["filter", "page", "state", "function", "after"];

export function read() {
  const query = new URLSearchParams(location.search);
  return Object.fromEntries(NAMES.map((name) => [name, query.get(name) ?? ""]));
}

// Cursors of the newer pages of queued calls, newest first; "" is the first page.
export const trail = () => history.state?.trail ?? [];

// Sets query parameters; an empty value removes the parameter. `push` adds an
// entry to the history, so that the back button returns to the current state.
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
