// The form, the stream of tokens, and what is told of each.

import { watch } from "./live.js";

const $ = (id) => document.getElementById(id);
const MEASURES = {
  confidence: { probability: [0, 1, .9], margin: [0, 1, .8], entropy: [0, 5, .5] },
  converged: {
    latent_diff: [0, 1, .03], cosine: [0, .1, .001], kl: [0, .1, .001], entropy_diff: [0, .1, .001],
    argmax: [1, 10, 5], minp_kl: [0, .001, .00001],
  },
  gate: { "": [0, 1, .5] },
};
const POLICIES = {
  "": "the model’s own", full: "full", fixed: "fixed", router: "its router", gate: "its exit gate",
  confidence: "confidence", converged: "convergence", chain: "a chain of layers", deadline: "a deadline",
};
const WHY = {
  full_depth: "all the way", fixed_depth: "as asked", routed: "its router let it go", gated: "its gate let it go",
  confident: "sure enough", converged: "it had settled", governed: "the server was busy", out_of_time: "out of time",
};

let models = new Map();
let running = null;   // the AbortController of the completion under way
let chosen = null;    // the token that is told about
let redraw = () => {};

const model = () => models.get($("model").value);
const shade = (depth) => {
  const full = model()?.max_depth ?? 1;
  return full > 1 ? Math.max(0, depth - 1) / (full - 1) : .1;
};
const headers = () => ($("key").value ? { authorization: `Bearer ${$("key").value}` } : {});

// -- settings ------------------------------------------------------------------------------------------------

function fill(select, entries, kept) {
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
  if (entries.some(([value]) => value === kept)) select.value = kept;
}

async function loadModels() {
  const answer = await fetch("v1/models", { headers: headers() });
  if (answer.status === 401) return askForKey();
  if (!answer.ok) return;
  const listed = (await answer.json()).data;
  models = new Map(listed.map((m) => [m.id, m]));
  fill($("model"), listed.map((m) => [m.id, m.id]), $("model").value);
  modelChanged();
  status(true);
}

function status(well) {
  const count = models.size;
  $("server").className = well ? (count ? "ready" : "") : "lost";
  $("server").textContent = !well ? "no answer" : count ? `${count} model${count === 1 ? "" : "s"} ready` : "loading";
}

function askForKey() {
  $("key-field").hidden = false;
  problem("This server asks for an API key.");
}

function modelChanged() {
  if (!model()) return;
  const kinds = ["", ...model().depth_policies];
  fill($("policy"), kinds.map((kind) => [kind, POLICIES[kind] ?? kind]), $("policy").value);
  fill($("depth"), model().depths.map((d) => [`${d}`, `${d} of ${model().max_depth}`]), `${model().max_depth}`);
  $("layers").value = [...Array(model().layers).keys()].join(", ");
  policyChanged();
  redraw();
}

function policyChanged() {
  const kind = $("policy").value;
  $("depth-field").hidden = kind !== "fixed";
  $("layers-field").hidden = kind !== "chain";
  $("seconds-field").hidden = kind !== "deadline";
  $("measure-field").hidden = !["confidence", "converged"].includes(kind);
  $("threshold-field").hidden = !(kind in MEASURES);
  if (kind in MEASURES) {
    fill($("measure"), Object.keys(MEASURES[kind]).map((name) => [name, name.replace("_", " ")]), $("measure").value);
    measureChanged();
  }
}

function measureChanged() {
  const [low, high, usual] = MEASURES[$("policy").value][$("measure").value];
  Object.assign($("threshold"), { min: low, max: high, step: (high - low) / 100, value: usual });
  $("threshold-value").value = (+$("threshold").value).toPrecision(2);
}

function policy() {
  const kind = $("policy").value, threshold = $("threshold").value;
  switch (kind) {
    case "fixed": return `fixed(${$("depth").value})`;
    case "gate": return `gate(${threshold})`;
    case "confidence": case "converged": return `${kind}(${$("measure").value}, ${threshold})`;
    case "chain": return `chain(${$("layers").value})`;
    default: return kind || undefined;
  }
}

// -- a completion --------------------------------------------------------------------------------------------

async function start() {
  if (running) return;
  const stop = running = new AbortController();
  const prompt = $("prompt").value;
  const told = { counts: new Map(), tokens: 0, began: performance.now(), first: null, usage: null };
  problem("");
  hideTip();
  $("output").replaceChildren(span("given", prompt));
  $("output").classList.add("writing");
  $("start").hidden = true;
  $("stop").hidden = false;
  $("summary").textContent = "";
  $("depths").hidden = true;
  try {
    await complete(prompt, stop.signal, told);
  } catch (error) {
    if (!stop.signal.aborted) problem(error.message);
  }
  running = null;
  $("output").classList.remove("writing");
  $("stop").hidden = true;
  $("start").hidden = false;
  summarise(told, stop.signal.aborted);
}

async function complete(prompt, signal, told) {
  const body = {
    model: $("model").value, prompt, max_tokens: +$("max_tokens").value, temperature: +$("temperature").value,
    depth: policy(), stream: true, stream_options: { include_usage: true }, return_tokens: true, logprobs: 0,
  };
  if ($("policy").value === "deadline") body.timeout_s = +$("seconds").value;
  const answer = await fetch("v1/completions", {
    method: "POST", headers: { "content-type": "application/json", ...headers() }, body: JSON.stringify(body), signal,
  });
  if (answer.status === 401) askForKey();
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  for await (const event of events(answer.body)) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) told.usage = event.usage;
    for (const choice of event.choices) take(choice, told);
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

function take(choice, told) {
  const output = $("output");
  const atEnd = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
  const made = document.createDocumentFragment();
  let shown = 0;
  for (const token of choice.tokens) {
    told.first ??= performance.now();
    told.tokens += 1;
    told.counts.set(token.depth, (told.counts.get(token.depth) ?? 0) + 1);
    shown += token.text.length;
    const element = span("token", token.text);
    element.style.setProperty("--depth", shade(token.depth));
    element.told = token;
    made.append(element);
  }
  if (choice.text.length > shown) made.append(span("", choice.text.slice(shown)));
  output.append(made);
  if (atEnd) output.scrollTop = output.scrollHeight;
  histogram(told);
}

function span(kind, text) {
  const made = document.createElement("span");
  made.className = kind;
  made.textContent = text;
  return made;
}

function histogram(told) {
  const known = model()?.depths ?? [], depths = known.length > 24 ? [...told.counts.keys()].sort((a, b) => a - b) : known;
  const most = Math.max(...told.counts.values());
  $("depths").hidden = depths.length < 2;
  $("depths").style.setProperty("--count", depths.length);
  $("depths").replaceChildren(...depths.map((depth) => {
    const bar = document.createElement("div"), block = document.createElement("i");
    const count = told.counts.get(depth) ?? 0;
    bar.className = "bar";
    bar.style.setProperty("--depth", shade(depth));
    block.style.height = `${2.1 * count / most}rem`;
    bar.title = `depth ${depth}: ${count} tokens`;
    bar.append(block, depths.length <= 12 ? `${depth}` : "");
    return bar;
  }));
  const said = depths.map((d) => `depth ${d}: ${told.counts.get(d) ?? 0}`).join(", ");
  $("depths").setAttribute("aria-label", `Tokens by depth. ${said}`);
}

function summarise(told, stopped) {
  if (!told.tokens) return;
  const seconds = (performance.now() - told.first) / 1000, full = model()?.max_depth ?? 1;
  let depths = 0;
  for (const [depth, count] of told.counts) depths += depth * count;
  const parts = [
    [`${told.tokens}`, ` tokens${stopped ? ", stopped" : ""}`],
    [Math.round((told.tokens - 1) / seconds || 0).toLocaleString("en"), " tokens/s"],
    [`${Math.round(told.first - told.began)} ms`, " to the first"],
  ];
  if (full > 1) parts.push([(depths / told.tokens).toFixed(2), ` of ${full} mean depth`]);
  if (told.usage && full > 1) parts.push([`${Math.round(100 * told.usage.flops_saved)} %`, " of the compute saved"]);
  $("summary").replaceChildren(...parts.flatMap(([value, text], i) => {
    const bold = document.createElement("b");
    bold.textContent = value;
    return [i ? " · " : "", bold, text];
  }));
}

function problem(text) {
  $("problem").hidden = !text;
  $("problem").textContent = text;
}

// -- what is told of a token ---------------------------------------------------------------------------------

function tell(element) {
  hideTip();
  if (!element?.told) return;
  const { told } = element, tip = $("tip");
  chosen = element;
  element.classList.add("chosen");
  const text = document.createElement("b");
  text.textContent = JSON.stringify(told.text).slice(1, -1) || "(part of a character)";
  const sure = told.logprob === undefined ? "" : ` · ${(100 * Math.exp(told.logprob)).toPrecision(3)} %, log ${told.logprob.toFixed(2)}`;
  const line = document.createElement("div");
  line.textContent = `depth ${told.depth} of ${model()?.max_depth ?? 1}: ${WHY[told.exit_reason] ?? told.exit_reason}`;
  const more = document.createElement("div");
  more.textContent = `token ${told.id}${sure}`;
  tip.replaceChildren(text, line, more);
  tip.hidden = false;
  const at = element.getClientRects()[0] ?? element.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const below = at.bottom + own.height + 10 < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - own.width - 8))}px`;
  tip.style.top = `${below ? at.bottom + 6 : at.top - own.height - 6}px`;
}

function hideTip() {
  chosen?.classList.remove("chosen");
  chosen = null;
  $("tip").hidden = true;
}

function step(key) {
  const tokens = [...document.querySelectorAll(".token")], at = tokens.indexOf(chosen);
  const wanted = { ArrowRight: at + 1, ArrowLeft: at < 0 ? tokens.length - 1 : at - 1, Home: 0, End: tokens.length - 1 }[key];
  const next = tokens[wanted];
  next?.scrollIntoView({ block: "nearest" });
  if (next) tell(next);
}

// -- wiring --------------------------------------------------------------------------------------------------

$("form").addEventListener("submit", (event) => { event.preventDefault(); start(); });
$("stop").addEventListener("click", () => running?.abort());
$("model").addEventListener("change", modelChanged);
$("policy").addEventListener("change", policyChanged);
$("measure").addEventListener("change", measureChanged);
$("key").addEventListener("change", () => { problem(""); loadModels(); });
$("threshold").addEventListener("input", () => { $("threshold-value").value = (+$("threshold").value).toPrecision(2); });
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  else if (event.key === "Escape") { running?.abort(); hideTip(); }
});
$("output").addEventListener("pointerover", (event) => tell(event.target));
$("output").addEventListener("pointerleave", hideTip);
$("output").addEventListener("blur", hideTip);
$("output").addEventListener("scroll", () => { if (!$("output").matches(":focus")) hideTip(); });
$("output").addEventListener("keydown", (event) => {
  if (["ArrowRight", "ArrowLeft", "Home", "End"].includes(event.key)) { event.preventDefault(); step(event.key); }
});

redraw = watch(() => $("model").value, shade, headers, (well, code, names) => {
  status(well);
  if (code === 401) askForKey();
  if (well && (names.length !== models.size || names.some((name) => !models.has(name)))) loadModels();
});
