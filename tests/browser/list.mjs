// The list of functions: pages, filter, and the badge of each state.

import assert from "node:assert/strict";

import { background, check, showsText, text } from "./browser.mjs";
import { Up, eventually } from "./program.mjs";

const MANY = 1200;
const name = (number) => `many-${String(number).padStart(4, "0")}`;
const STACK = [
  "functions:",
  ...Array.from({ length: MANY }, (_, number) => `  ${name(number)}: {fprocess: cat, image: 'example.org/${name(number)}:latest'}`),
  "  a-ready: {fprocess: cat}",
  "  a-zero: {fprocess: cat}",
  "  a-crashing: {fprocess: \"sh -c 'echo cannot open the database >&2; exit 3'\", environment: {mode: http}}",
  "  a-starting: {fprocess: sleep 1000, environment: {mode: http}}",
].join("\n");

export default {
  before: async () => {
    const up = await Up.start(STACK);
    const body = JSON.stringify({ serviceName: "a-zero", replicas: 0 });
    await fetch(`${up.url}/system/scale-function/a-zero`, { method: "POST", body });
    return up;
  },
  after: (up) => up.remove(),
  tests: {
    "1,200 functions are shown in pages": async ({ world: up, tab }) => {
      const it = await tab(`${up.url}/ui/`);
      const { page } = it;
      await showsText(page, "#count", /^1204$/);
      assert.equal(await page.locator("#rows tr").count(), 50);
      const height = await page.evaluate(() => document.documentElement.scrollHeight);
      assert.ok(height < 5000, `the page is ${height} px high`);
      await showsText(page, "#pageText", /^Page 1 of 25$/);
      await check(it, "many functions");
      await page.click("#pageNext");
      await showsText(page, "#pageText", /^Page 2 of 25$/);
      await showsText(page, "#rows tr:first-child .pick", new RegExp(`^${name(46)}$`));
      assert.match(page.url(), /[?&]page=2/);
      await page.reload();
      await showsText(page, "#pageText", /^Page 2 of 25$/);
      await page.goBack();
      await showsText(page, "#pageText", /^Page 1 of 25$/);
      await page.goto(`${up.url}/ui/?page=25`);
      await showsText(page, "#rows tr:last-child .pick", new RegExp(`^${name(1199)}$`));
      assert.equal(await page.getAttribute("#pageNext", "aria-disabled"), "true");
      await page.click("#pageNext", { force: true });
      await showsText(page, "#pageText", /^Page 25 of 25$/);
    },
    "the slash key focuses the filter, which finds functions on all pages": async ({ world: up, tab }) => {
      const it = await tab(`${up.url}/ui/?page=3`);
      const { page } = it;
      await showsText(page, "#count", /^1204$/);
      await page.keyboard.press("/");
      assert.equal(await page.evaluate(() => document.activeElement.id), "filter");
      await page.keyboard.type("many-1199");
      await showsText(page, "#count", /^1 of 1204$/);
      assert.equal(await text(page, "#rows .pick"), "many-1199");
      assert.match(page.url(), /[?&]filter=many-1199/);
      assert.doesNotMatch(page.url(), /page=/);
      await check(it, "filtered");
      await page.click("#rows .pick");
      assert.match(page.url(), /filter=many-1199#many-1199/);
      await page.reload();
      await showsText(page, "#count", /^1 of 1204$/);
      await showsText(page, "#callTitle", /^Call many-1199/);
      // Inside of a field, the slash key types a slash.
      await page.fill("#path", "");
      await page.focus("#path");
      await page.keyboard.type("/a/b");
      assert.equal(await page.inputValue("#path"), "/a/b");
      await page.fill("#filter", "nothing has this name");
      await showsText(page, "#nomatch", /No function matches/);
      await check(it, "no match");
    },
    "each state of a function has a colour and a name of its own": async ({ world: up, tab }) => {
      const it = await tab(`${up.url}/ui/?filter=a-`);
      const states = {};
      for (const [row, state] of [["a-ready", "ready"], ["a-zero", "zero"], ["a-starting", "scaling"], ["a-crashing", "crashing"]]) {
        const badge = it.page.locator("#rows tr", { hasText: row }).locator(".state");
        await eventually(`${row} is ${state}`, async () => (await badge.innerText()) === state);
        states[state] = await background(badge);
      }
      assert.equal(new Set(Object.values(states)).size, 4, JSON.stringify(states));
      await check(it, "states");
    },
    "a crashing function is shown with its exit status and last output line": async ({ world: up, tab }) => {
      const it = await tab(`${up.url}/ui/?filter=a-crashing`);
      await showsText(it.page, "#rows .state", /^crashing$/);
      await showsText(it.page, "#rows .reason", /starts in a row have failed: exit status: 3\ncannot open the database/);
      await check(it, "crashing");
    },
  },
};
