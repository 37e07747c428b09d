// Opens pages in Chromium with a phone or desktop viewport, and records console messages and policy violations.

import assert from "node:assert/strict";
import { mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(`${process.env.BROWSER_MODULES}/`);
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

export const VIEWPORTS = {
  phone: { viewport: { width: 390, height: 844 }, hasTouch: true, isMobile: true, deviceScaleFactor: 2 },
  desktop: { viewport: { width: 1280, height: 800 } },
};

const ARGS = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
];

// A browser with a fresh user data directory.
export const launch = () =>
  chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", headless: true, args: ARGS });

// Opens a tab on `url`. Failed requests are expected where a test stops the gateway; any other console error or warning
// is recorded as a fault.
export async function open(browser, device, url) {
  const context = await browser.newContext(VIEWPORTS[device]);
  const page = await context.newPage();
  const faults = [];
  page.on("pageerror", (error) => faults.push(`error: ${error}`));
  page.on("console", (message) => {
    const text = message.text();
    if (/^Failed to load resource/.test(text)) return;
    if (["error", "warning"].includes(message.type())) faults.push(`${message.type()}: ${text}`);
  });
  await page.addInitScript(() => {
    globalThis.policyViolations = [];
    document.addEventListener("securitypolicyviolation", (event) => {
      globalThis.policyViolations.push(`${event.violatedDirective}: ${event.blockedURI}`);
    });
  });
  page.setDefaultTimeout(20_000);
  await page.goto(url);
  return { page, context, faults, device };
}

// Checks the invariants of every state: no accessibility violation in the light and the dark scheme, nothing wider than
// the screen, an empty console, no policy violation.
export async function check({ page, faults, device }, state) {
  for (const colorScheme of ["light", "dark"]) {
    await page.emulateMedia({ colorScheme });
    await page.evaluate(axe);
    const { violations } = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
    const found = violations.flatMap(({ id, nodes }) => nodes.map((node) => `${id}: ${node.html}: ${node.failureSummary}`));
    assert.deepEqual(found, [], `${state}, ${colorScheme}`);
    if (process.env.SCREENSHOTS) {
      mkdirSync(process.env.SCREENSHOTS, { recursive: true });
      const path = `${process.env.SCREENSHOTS}/${device}-${state.replaceAll(/\W+/g, "-")}-${colorScheme}.png`;
      await page.screenshot({ path, fullPage: true });
    }
  }
  await page.emulateMedia({ colorScheme: "light" });
  const [wide, screen] = await page.evaluate(() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]);
  assert.ok(wide <= screen, `${state}: the page is ${wide} px wide on a screen of ${screen} px`);
  const cut = await page.evaluate(() =>
    [...document.querySelectorAll(".card")].filter((card) => card.scrollWidth > card.clientWidth + 1).map((card) => card.id));
  assert.deepEqual(cut, [], `${state}: wider than its card`);
  assert.deepEqual([...faults, ...(await page.evaluate(() => globalThis.policyViolations))], [], state);
}

export const text = (page, selector) => page.locator(selector).innerText();

// Waits until the text of the element matches.
export async function showsText(page, selector, pattern) {
  const holds = ([selector, source]) => {
    const node = document.querySelector(selector);
    return node && node.checkVisibility() && new RegExp(source, "s").test(node.innerText);
  };
  try {
    await page.waitForFunction(holds, [selector, pattern.source]);
  } catch (error) {
    const shown = await page.locator(selector).innerText().catch(() => "");
    throw new Error(`${selector} shows ${JSON.stringify(shown)}, never ${pattern}`, { cause: error });
  }
}

export const background = (locator) => locator.evaluate((node) => getComputedStyle(node).backgroundColor);
