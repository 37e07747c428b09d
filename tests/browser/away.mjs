// The page while the gateway or the provider is unreachable, and its recovery.

import assert from "node:assert/strict";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";

import { background, check, showsText, text } from "./browser.mjs";
import { Program, Up, eventually, freePort } from "./program.mjs";

// Starts a gateway and a provider as separate processes.
async function startSeparately() {
  const directory = mkdtempSync(path.join(tmpdir(), "gateway-browser-"));
  const [port, providerPort] = [await freePort(), await freePort()];
  const url = `http://127.0.0.1:${port}`;
  const provider = new Program(["provider", "process"], { provider_port: `${providerPort}`, state_dir: `${directory}/provider` });
  const gateway = new Program(["serve"], {
    listen_address: "127.0.0.1", port: `${port}`, metrics_port: "0", functions_provider_url: `http://127.0.0.1:${providerPort}`,
    queue: "embedded", state_dir: `${directory}/queue`, shutdown_grace: "1s",
  });
  await provider.start(`http://127.0.0.1:${providerPort}/healthz`);
  await gateway.start(`${url}/_/healthz`);
  const deploy = JSON.stringify({ service: "echo", envProcess: "cat" });
  const deployed = await fetch(`${url}/system/functions`, { method: "POST", body: deploy });
  assert.equal(deployed.status, 202);
  return { directory, url, provider, gateway, providerUrl: `http://127.0.0.1:${providerPort}/healthz` };
}

export default {
  before: async () => ({ up: await Up.start("functions: {echo: {fprocess: cat}}\n"), separate: await startSeparately() }),
  after: async ({ up, separate: { provider, gateway, directory } }) => {
    await up.remove();
    await gateway.stop();
    await provider.stop();
    rmSync(directory, { recursive: true, force: true });
  },
  tests: {
    "while the gateway is down the page shows the age of its data, and it recovers without a reload": async ({ world: { up }, tab }) => {
      const id = await up.queue("echo");
      await up.waitForState(id, "succeeded");
      const it = await tab(`${up.url}/ui/`);
      const { page } = it;
      await page.evaluate(() => { globalThis.notReloaded = true; });
      const badges = [page.locator("#rows .state").first(), page.locator(`[data-call="${id}"] .state`)];
      const fresh = [];
      for (const badge of badges) fresh.push(await background(badge));
      assert.equal(new Set(fresh).size, 1, "ready and succeeded are both green");
      await up.stop("SIGKILL");
      await showsText(page, "#troubleText", /cannot be reached.*Greyed out parts are as of \d/);
      await showsText(page, "#healthText", /^unreachable$/);
      for (const badge of badges) assert.notEqual(await background(badge), fresh[0], "green although the data is old");
      for (const old of ["lister", "queue"]) assert.match(await page.getAttribute(`#${old}`, "data-old"), /^since \d/);
      await check(it, "gateway gone");
      await up.restart();
      await page.locator("#trouble").waitFor({ state: "hidden" });
      await showsText(page, "#healthText", /^ready$/);
      assert.equal(await background(badges[0]), fresh[0]);
      assert.equal(await page.locator("[data-old]").count(), 0);
      assert.equal(await page.evaluate(() => globalThis.notReloaded), true);
    },
    "while the provider is down the list shows an error instead of loading forever": async ({ world: { separate: it }, tab }) => {
      const loaded = await tab(`${it.url}/ui/`);
      await showsText(loaded.page, "#count", /^1$/);
      const green = await background(loaded.page.locator("#rows .state"));
      await it.provider.stop("SIGKILL");
      const opened = await tab(`${it.url}/ui/`);
      await showsText(opened.page, "#loading", /^The list of functions cannot be loaded: .*provider/);
      assert.doesNotMatch(await text(opened.page, "#lister"), /Loading/);
      await showsText(opened.page, "#queueTitle", /Queued calls/);
      await check(opened, "provider away at the start");
      await showsText(loaded.page, "#troubleText", /provider.*Greyed out parts are as of \d/);
      assert.notEqual(await background(loaded.page.locator("#rows .state")), green);
      assert.equal(await loaded.page.getAttribute("#queue", "data-old"), null, "the queue is not the provider's");
      await check(loaded, "provider away later");
      await it.provider.start(it.providerUrl);
      for (const { page } of [opened, loaded]) {
        await showsText(page, "#count", /^1$/);
        await page.locator("#trouble").waitFor({ state: "hidden" });
        await eventually("the badge is green", async () => (await background(page.locator("#rows .state"))) === green);
      }
    },
  },
};
