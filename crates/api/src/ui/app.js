// Entry point of the page: live list of functions, form to call the selected
// function, live list of queued calls.

import { call, cancel } from "./call.js";
import { asList, setText, ui } from "./dom.js";
import * as form from "./form.js";
import * as list from "./list.js";
import { askJson, part, pollForever, root, wake } from "./poll.js";
import * as queue from "./queue.js";

function showInfo(info) {
  const { release, sha, commit_message: message } = info?.version ?? {};
  const parts = [release, sha?.slice(0, 7), info?.provider?.provider, info?.arch];
  setText(ui.version, parts.filter(Boolean).join(" · "));
  ui.version.title = message ?? "";
}

async function pollFunctions() {
  const namespace = ui.namespace.value;
  const query = namespace ? `?${new URLSearchParams({ namespace })}` : "";
  const found = await askJson(`system/functions${query}`);
  // Drop the response if the user has selected another namespace meanwhile.
  if (namespace === ui.namespace.value) list.showFunctions(asList(found));
}

const functions = part(ui.lister, () => pollFunctions().catch((error) => {
  // The gateway returns these when the provider did not return a list.
  if ([502, 503, 504].includes(error.status)) error.message = `the provider does not respond (${error.message})`;
  throw error;
}));
functions.failed = ({ status, message }) => list.showListTrouble(status ? message : "the gateway cannot be reached");
const calls = part(ui.queue, queue.poll);

list.start({ whenSelected: form.showSelected, wake });
form.start(call);
queue.start({ wake, names: list.names });
ui.retry.addEventListener("click", wake);
ui.cancel.addEventListener("click", cancel);
addEventListener("online", wake);
document.addEventListener("visibilitychange", () => { if (!document.hidden) wake(); });

const gateway = root.href.replace(/\/$/, "");
ui.deployLine.textContent = `faas-cli deploy --gateway ${gateway} \\\n  --name hello --image IMAGE`;
ui.deployStack.textContent = `faas-cli deploy --gateway ${gateway} -f stack.yaml`;
pollForever([functions, calls], [
  { path: "system/info", show: showInfo },
  { path: "system/namespaces", show: list.showNamespaces },
]);
