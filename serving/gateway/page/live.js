// The server's counters, asked for once a second while the page is seen, and what they say of the last minute.

import { lines, quantile, stack } from "./chart.js";

const $ = (id) => document.getElementById(id);
const EVERY_MS = 1000, KEPT_S = 60;

let before = new Map();   // model -> its counters when last asked
let history = new Map();  // model -> [{at, bands, rate, p50, p95}]

function difference(now, then) {
  const seconds = now.at - then.at;
  const ticks = sum(now.stage_ticks) - sum(then.stage_ticks);
  const bands = new Map();
  for (const [stage, rows] of Object.entries(now.stage_rows)) {
    for (const [depth, count] of Object.entries(rows)) {
      const more = count - (then.stage_rows[stage]?.[depth] ?? 0);
      if (more > 0 && ticks > 0) bands.set(+depth, (bands.get(+depth) ?? 0) + more / ticks);
    }
  }
  const counts = now.between_tokens.map(([bound, n], i) => [bound, n - (then.between_tokens[i]?.[1] ?? 0)]);
  return {
    at: performance.now() / 1000, bands, rate: Math.max(0, now.generated - then.generated) / seconds,
    p50: quantile(counts, .5), p95: quantile(counts, .95),
  };
}

const sum = (counts) => Object.values(counts).reduce((a, b) => a + b, 0);

function take(stats) {
  for (const [name, model] of Object.entries(stats.models)) {
    model.at = stats.at;
    const then = before.get(name);
    if (then && model.at > then.at && model.generated >= then.generated) {
      const samples = history.get(name) ?? [];
      samples.push(difference(model, then));
      const now = performance.now() / 1000;
      history.set(name, samples.filter((s) => now - s.at < KEPT_S));
    }
    before.set(name, model);
  }
}

const ms = (seconds) => seconds < .01 ? (seconds * 1000).toFixed(1) : Math.round(seconds * 1000).toString();

function draw(name, shade) {
  const samples = history.get(name) ?? [], model = before.get(name), now = performance.now() / 1000;
  const depths = [...new Set(samples.flatMap((s) => [...s.bands.keys()]))].sort((a, b) => a - b);
  const tops = {
    rows: stack($("rows"), samples, depths, shade, now),
    rate: lines($("rate"), samples, [{ kind: "", of: (s) => s.rate }], 10, now),
    latency: 1000 * lines($("latency"), samples, [{ kind: "", of: (s) => s.p50 }, { kind: "faint", of: (s) => s.p95 }], .01, now),
  };
  for (const [id, top] of Object.entries(tops)) $(id).parentElement.dataset.top = Math.round(top).toLocaleString("en");
  const last = samples.at(-1);
  const rows = last ? [...last.bands.values()].reduce((a, b) => a + b, 0) : 0;
  $("rows-now").textContent = rows.toFixed(rows && rows < 10 ? 1 : 0);
  $("rate-now").textContent = Math.round(last?.rate ?? 0).toLocaleString("en");
  $("latency-now").textContent = last && last.p50 !== null ? `${ms(last.p50)} / ${ms(last.p95)} ms` : "–";
  if (model) {
    const replicas = Object.keys(model.replicas).length;
    $("load").textContent = `${model.running} of ${model.slots} slots taken, ${model.waiting} waiting, ` +
      `${replicas} replica${replicas === 1 ? "" : "s"}`;
  }
}

// chosen: () -> the model to show; shade: depth -> 0 to 1; heard: whether the server answers, HTTP's status, and its models.
export function watch(chosen, shade, headers, heard) {
  const ask = async () => {
    if (document.visibilityState === "visible") {
      try {
        const answer = await fetch("v1/fathom/stats", { headers: headers() });
        const stats = answer.ok ? await answer.json() : { models: {} };
        if (answer.ok) { take(stats); draw(chosen(), shade); }
        heard(answer.ok, answer.status, Object.keys(stats.models));
      } catch { heard(false, 0, []); }
    }
    setTimeout(ask, EVERY_MS);
  };
  ask();
  return () => draw(chosen(), shade);
}
