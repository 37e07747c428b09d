// The form for calling a function.

import assert from "node:assert/strict";

import { check, showsText, text } from "./browser.mjs";
import { Up } from "./program.mjs";

const STACK = "functions: {echo: {fprocess: cat}, env: {fprocess: env}}\n";

export default {
  before: () => Up.start(STACK),
  after: (up) => up.remove(),
  tests: {
    "the response of a called function is shown": async ({ world: up, tab }) => {
      const it = await tab(`${up.url}/ui/#echo.openfaas-fn`);
      await it.page.fill("#body", "hello from a page");
      await it.page.click("#send");
      await showsText(it.page, "#response pre", /^hello from a page$/);
      assert.match(await text(it.page, "#summary"), /^200 OK/);
      await check(it, "called");
    },
    "an invalid header is reported next to its field, and the URL is unchanged": async ({ world: up, tab }) => {
      const it = await tab(`${up.url}/ui/#echo.openfaas-fn`);
      const { page } = it;
      await showsText(page, "#url", /^http:.*\/function\/echo\.openfaas-fn$/);
      const url = await text(page, "#url");
      await page.fill("#headers", "X-Good: 1\nno header");
      await page.click("#send");
      await showsText(page, "#headersError", /no header/);
      assert.equal(await text(page, "#url"), url);
      assert.equal(await page.getAttribute("#headers", "aria-invalid"), "true");
      assert.equal(await page.getAttribute("#headers", "aria-describedby"), "headersError");
      assert.equal(await page.evaluate(() => document.activeElement.id), "headers");
      assert.equal(await page.isVisible("#result"), false, "nothing is sent");
      const [field, error] = [await page.locator("#headers").boundingBox(), await page.locator("#headersError").boundingBox()];
      assert.ok(error.y >= field.y && error.y - (field.y + field.height) < 20, "the message is below the field");
      await check(it, "invalid header");
      await page.fill("#headers", "X-Good: 1");
      assert.equal(await page.isVisible("#headersError"), false);
      await page.click("#send");
      await showsText(page, "#summary", /^200 OK/);
    },
    "a path outside of the function is reported next to its field": async ({ world: up, tab }) => {
      const it = await tab(`${up.url}/ui/#env.openfaas-fn`);
      await it.page.fill("#path", "/../../system/functions");
      await it.page.click("#send");
      await showsText(it.page, "#pathError", /must stay below the function/);
      assert.equal(await it.page.isVisible("#urlLine"), false);
      assert.equal(await it.page.isVisible("#result"), false);
      await check(it, "invalid path");
    },
  },
};
