// The table of queued calls.

import assert from "node:assert/strict";

import { background, check, showsText, text } from "./browser.mjs";
import { Up, eventually } from "./program.mjs";

const STACK = `
functions:
  echo: {fprocess: cat}
  other-function-with-quite-a-long-name: {fprocess: cat}
  slow: {fprocess: sleep 1000, environment: {exec_timeout: 1000s}}
  broken:
    fprocess: "false"
    annotations: {com.openfaas.retry.min_wait: 100s, com.openfaas.retry.max_wait: 200s}
`;
const LONG = "other-function-with-quite-a-long-name";

// Queues 77 calls that succeed and one for each other state. Returns the ids, newest first.
async function before() {
  const up = await Up.start(STACK);
  const ids = [];
  for (let number = 0; number < 77; number += 1) ids.push(await up.queue(number % 10 === 0 ? LONG : "echo"));
  for (const id of ids) await up.waitForState(id, "succeeded");
  const states = { succeeded: ids.at(-1) };
  states.dead = await up.queue("broken", { "X-Max-Attempts": "1" });
  states.retrying = await up.queue("broken");
  states.running = await up.queue("slow");
  states.queued = await up.queue("echo", { "X-Delay-Seconds": "1000" });
  states.cancelled = await up.queue("echo", { "X-Delay-Seconds": "1000" });
  states.failed = await up.queue("echo", { "X-Delay-Seconds": "2", "X-Expires-Seconds": "1" });
  await fetch(`${up.url}/async-function/${states.cancelled}`, { method: "DELETE" });
  for (const [state, id] of Object.entries(states)) await up.waitForState(id, state === "dead" ? "failed" : state);
  const all = [...ids, ...Object.values(states).slice(1)].reverse();
  return { up, states, all };
}

const shown = (page) => page.locator("#queueRows tr").evaluateAll((rows) => rows.map((row) => row.dataset.call));
const shows = (page, ids) => eventually(`${ids.length} calls from ${ids[0]} on`, async () => (await shown(page)).join() === ids.join());

export default {
  before,
  after: ({ up }) => up.remove(),
  tests: {
    "all queued calls are listed in pages, newest first": async ({ world: { up, all }, tab }) => {
      const it = await tab(`${up.url}/ui/`);
      const { page } = it;
      await shows(page, all.slice(0, 50));
      await check(it, "queue");
      await page.click("#queueOlder");
      await shows(page, all.slice(50));
      assert.match(page.url(), /[?&]after=/);
      assert.equal(await page.getAttribute("#queueOlder", "aria-disabled"), "true");
      await check(it, "older calls");
      await page.reload();
      await shows(page, all.slice(50));
      await page.click("#queueNewer");
      await shows(page, all.slice(0, 50));
      await page.goBack();
      await shows(page, all.slice(50));
      await page.click("#queueNewest");
      await shows(page, all.slice(0, 50));
    },
    "calls are filtered by state and function, and the URL has the filter": async ({ world: { up, all, states }, tab }) => {
      const it = await tab(`${up.url}/ui/`);
      const { page } = it;
      await page.selectOption("#queueState", "dead");
      await shows(page, [states.dead]);
      assert.match(page.url(), /[?&]state=dead/);
      await page.selectOption("#queueState", "");
      await page.fill("#queueFunction", LONG);
      await page.keyboard.press("Enter");
      const long = all.slice(6).filter((_, index) => (76 - index) % 10 === 0);
      await shows(page, long);
      assert.match(page.url(), new RegExp(`[?&]function=${LONG}`));
      await check(it, "filtered calls");
      await page.reload();
      await shows(page, long);
      assert.equal(await page.inputValue("#queueFunction"), LONG);
      await page.goBack();
      await shows(page, all.slice(0, 50));
      assert.equal(await page.inputValue("#queueFunction"), "");
      await page.goto(`${up.url}/ui/?state=cancelled&function=echo`);
      await shows(page, [states.cancelled]);
      assert.equal(await page.inputValue("#queueState"), "cancelled");
      await page.selectOption("#queueState", "running");
      await showsText(page, "#queueNone", /No queued call matches/);
      await check(it, "no call");
      await page.fill("#queueFunction", "no/name");
      await page.keyboard.press("Enter");
      await showsText(page, "#queueInvalid", /not a function's name/);
      await check(it, "invalid function");
    },
    "each state of a call has a colour and a name of its own": async ({ world: { up, states }, tab }) => {
      const it = await tab(`${up.url}/ui/`);
      const colours = {};
      for (const [state, id] of Object.entries(states)) {
        const badge = it.page.locator(`[data-call="${id}"] .state`);
        await badge.waitFor();
        assert.equal(await badge.innerText(), state);
        colours[state] = await background(badge);
      }
      assert.equal(Object.keys(colours).length, 7);
      assert.equal(new Set(Object.values(colours)).size, 7, JSON.stringify(colours));
    },
    "the table of calls fits its card, and all of its text is visible": async ({ world: { up, states }, tab, device }) => {
      const it = await tab(`${up.url}/ui/?function=${LONG}`);
      const { page } = it;
      await page.locator("#queueRows tr").first().waitFor();
      const outside = await page.evaluate(() => {
        const { left, right } = document.querySelector("#queue").getBoundingClientRect();
        const nodes = [...document.querySelectorAll("#queueRows th, #queueRows td, #queueRows span, #queueRows button")];
        return nodes.filter((node) => {
          const box = node.getBoundingClientRect();
          return box.width > 0 && (box.left < left || box.right > right);
        }).map((node) => node.outerHTML);
      });
      assert.deepEqual(outside, []);
      await page.goto(`${up.url}/ui/?state=dead`);
      const row = page.locator(`[data-call="${states.dead}"]`);
      for (const what of ["broken", "dead", "500"]) assert.match(await row.innerText(), new RegExp(what));
      assert.ok(await row.getByRole("button", { name: /^Retry call/ }).isVisible());
      if (device === "phone") assert.match(await row.innerText(), /500/);
      await check(it, "dead call");
    },
    "a waiting call is cancelled by its button": async ({ world: { up }, tab }) => {
      const id = await up.queue("other-function-with-quite-a-long-name", { "X-Delay-Seconds": "900" });
      const it = await tab(`${up.url}/ui/?state=queued`);
      await it.page.click(`[data-call="${id}"] button`);
      await up.waitForState(id, "cancelled");
      await eventually("the call is not listed", async () => !(await shown(it.page)).includes(id));
      await fetch(`${up.url}/system/queues/purge?function=${LONG}&state=cancelled`, { method: "POST" });
      assert.equal(await text(it.page, "#queueTitle").then((title) => title.startsWith("Queued calls")), true);
    },
  },
};
