// The queued calls, live: what waits, what failed for good, and the two things
// that can be done about a call. Hidden where the gateway has no queue.

const LIMIT = 50;

const ui = Object.fromEntries(
  [...document.querySelectorAll("[id^=queue]")].map((node) => [node.id, node]),
);

const cell = (text, className = "") =>
  Object.assign(document.createElement("td"), { textContent: text, className });

// What can be done about a call: the word on the button, the method, the path.
function actionOf(call) {
  const path = `system/calls/${encodeURIComponent(call.callId)}`;
  if (call.dead) return ["Retry", "POST", `${path}/retry`];
  if (["queued", "retrying"].includes(call.state)) return ["Cancel", "DELETE", path];
  return null;
}

function rowOf(call, root, refresh) {
  const tr = document.createElement("tr");
  tr.dataset.call = call.callId;
  const name = document.createElement("th");
  name.scope = "row";
  name.textContent = call.function;
  name.title = `X-Call-Id ${call.callId}`;
  const state = cell("");
  const word = call.dead ? "dead" : call.state;
  state.append(Object.assign(document.createElement("span"), { className: "state", textContent: word }));
  state.firstChild.dataset.state = word;
  state.title = call.reason ?? "";
  const action = cell("");
  const [text, method, path] = actionOf(call) ?? [];
  if (text) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
    button.ariaLabel = `${text} call ${call.callId}`;
    button.addEventListener("click", async () => {
      button.disabled = true;
      const answer = await fetch(new URL(path, root), { method }).catch(() => null);
      ui.queueTrouble.hidden = answer?.ok ?? false;
      ui.queueTrouble.textContent = answer ? await answer.text() : "The gateway cannot be reached.";
      await refresh();
    });
    action.append(button);
  }
  const submitted = new Date(call.submittedAt).toLocaleString();
  const status = call.status ? String(call.status) : "";
  tr.append(name, state, cell(String(call.attempts), "number"), cell(status, "number"), cell(submitted), action);
  return tr;
}

const key = (call) => [call.callId, call.state, call.attempts, call.status, call.dead].join();
let last = "";

// Asks for the queue once. A gateway without one says 501, and nothing is shown.
export async function pollQueue(root, askJson) {
  let lines;
  try {
    lines = await askJson("system/queues");
  } catch (error) {
    if (error.status) ui.queue.hidden = true;
    return;
  }
  const sum = (member) => lines.reduce((all, line) => all + line[member], 0);
  const counts = ["pending", "running", "delayed", "dead"].map((member) => `${sum(member)} ${member}`);
  ui.queueCounts.textContent = counts.join(" · ");
  ui.queue.hidden = false;
  const query = new URLSearchParams({ limit: LIMIT });
  if (ui.queueState.value) query.set("state", ui.queueState.value);
  const calls = await askJson(`system/calls?${query}`).catch(() => []);
  ui.queueTable.hidden = calls.length === 0;
  ui.queueNone.hidden = calls.length > 0;
  // Buttons that are drawn anew lose the focus, so they are only when something changed.
  const now = calls.map(key).join(";");
  if (now === last) return;
  last = now;
  const refresh = () => pollQueue(root, askJson);
  const focused = document.activeElement?.closest("tr")?.dataset.call;
  ui.queueRows.replaceChildren(...calls.map((call) => rowOf(call, root, refresh)));
  if (focused) ui.queueRows.querySelector(`[data-call="${CSS.escape(focused)}"] button`)?.focus();
}

export const onQueueFilter = (refresh) => ui.queueState.addEventListener("change", refresh);
