// Trefoil's page: a chat, and beside it what goes between the three parties. No dependencies, no build.
// Whatever comes from the server or the model enters the page through textContent only.
"use strict";

const $ = (id) => document.getElementById(id);
const LINKS = ["client->owner", "owner->client", "client->helper", "helper->client", "owner->helper", "helper->owner"];
const PARTIES = ["client", "owner", "helper"];
const title = (party) => party[0].toUpperCase() + party.slice(1);

// Storage may be forbidden (private windows, policies): the page then works without memory.
const store = {
  get(area, name) { try { return window[area].getItem(name); } catch { return null; } },
  set(area, name, value) { try { window[area].setItem(name, value); } catch { /* not remembered */ } },
};

// This script is in the head and not deferred, so that a chosen theme is there before the first paint.
const chosen = store.get("localStorage", "theme");
if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;

let key = store.get("sessionStorage", "key");
let state = null;      // the newest /api/state
let turns = [];        // the conversation; it lives in this page only
let running = null;    // AbortController of the request that runs

// ---------------------------------------------------------------- words and numbers

const group = (n) => String(Math.round(n)).replace(/\B(?=(\d{3})+$)/g, "\u202f");
const number = (x) => (x > 0 && x < 99.95 ? String(Number(x.toFixed(x < 9.95 ? 1 : 0))) : group(x));

function bytes(n) {
  if (n < 999.5) return `${number(n)}\u00a0B`;
  const unit = n < 999.5e3 ? 1 : n < 999.5e6 ? 2 : n < 999.5e9 ? 3 : 4;
  return `${(n / 1000 ** unit).toPrecision(3)}\u00a0${["B", "kB", "MB", "GB", "TB"][unit]}`;
}

const ms = (t) => `${t < 99.95 ? t.toFixed(1) : group(t)}\u00a0ms`;
const percent = (part, whole) => `${((100 * part) / whole).toFixed(1)}\u00a0%`;
const count = (n, one, many = `${one}s`) => `${group(n)} ${n === 1 ? one : many}`;

/** Entropy in bits per byte that n uniformly random bytes show on average: less than 8, since n is finite. */
function randomEntropy(n) {
  let chance = (255 / 256) ** n;                       // that a given value occurs k times, from k = 0 on
  let sum = 0;
  for (let k = 1; k <= n && k < 400; k++) {
    chance *= (n - k + 1) / k / 255;
    sum += chance * (k / n) * Math.log2(n / k);
  }
  return 256 * sum;
}

/** Sets text only where it differs: an unchanged live region stays silent, an unchanged page is not laid out again. */
function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** An element with properties, data-attributes (`data`) and children. */
function make(name, { data = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  Object.assign(element.dataset, data);
  element.append(...children);
  return element;
}

// ---------------------------------------------------------------- the gateway

class Failure extends Error {
  constructor(message, code, status) { super(message); Object.assign(this, { code, status }); }
}

async function api(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The gateway cannot be reached.", "unreachable");
  }
  if (response.ok) return response;
  const error = (await response.json().catch(() => null))?.error;
  let message = error?.message || `The gateway answered with HTTP ${response.status}.`;
  const later = Number(response.headers.get("Retry-After"));
  if (later > 0) message += ` Try again in ${later} s.`;
  throw new Failure(message, error?.code, response.status);
}

/** The data of each server-sent event. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {});                   // also when the consumer has left early
  }
}

function askKey(message) {
  put($("key-error"), key ? message : "");             // the first time it is no error
  status("bad", "API key needed");
  if (!$("key-form").hidden) return;
  $("key-form").hidden = false;
  $("key").focus();
}

// ---------------------------------------------------------------- polling

let timer, polling = false;

function status(kind, text) {
  $("status").dataset.kind = kind;
  put($("status"), text);
}

async function poll() {
  clearTimeout(timer);
  if (polling || document.hidden) return;
  polling = true;
  let pause = 1000;
  try {
    const response = await api("/api/state", { signal: AbortSignal.timeout(8000) });
    state = await response.json();
    $("key-form").hidden = true;
    status("good", "Connected");
    render();
    if (running || state.last?.running) pause = 250;
  } catch (error) {
    pause = 2000;
    if (error.status === 401) {
      askKey(error.message);
      pause = null;                                    // asking again without another key is no use
    } else if (error.status) {
      status("bad", error.message);
    } else {
      status("bad", "Connection lost, trying again");
      if (!(error instanceof Failure)) console.error(error);
    }
  }
  polling = false;
  if (pause && !document.hidden) timer = setTimeout(poll, pause);
}

// ---------------------------------------------------------------- chat

function addMessage(role, text) {
  const chat = state.model.chat;
  const name = role === "user" ? (chat ? "You" : "Your text") : (chat ? "Model" : "Continuation");
  const view = {
    root: make("article", { className: `message ${role}` }),
    text: make("div", { className: "text", textContent: text }),
    note: make("div", { className: "note small", hidden: true }),
  };
  view.root.append(make("h3", { textContent: name }), view.text, view.note);
  $("welcome").hidden = true;
  $("messages").append(view.root);
  follow(true);
  return view;
}

/** Keeps the end in sight, unless the reader has scrolled away from it. */
function follow(always) {
  const box = $("messages");
  if (always || box.scrollHeight - box.scrollTop - box.clientHeight < 80) box.scrollTop = box.scrollHeight;
}

function busy(on) {
  const had = document.activeElement === (on ? $("send") : $("stop"));
  $("send").hidden = on;
  $("stop").hidden = !on;
  if (had) $("prompt").focus();                        // a hidden button would drop the focus
}

/** Turns that failed or brought nothing are shown, but are no part of what the model gets next. */
function conversation(text) {
  const kept = turns.filter((turn) => turn.state !== "failed" && turn.answer);
  return [...kept.flatMap((turn) => [{ role: "user", content: turn.user }, { role: "assistant", content: turn.answer }]),
    { role: "user", content: text }];
}

async function send() {
  const text = $("prompt").value;
  if (running || !text.trim()) return;
  if (!state) return poll();                           // the status line says why
  for (const input of [$("temperature"), $("max-tokens")]) if (!input.reportValidity()) return;

  const chat = state.model.chat;
  const request = {
    model: state.model.id,
    ...(chat ? { messages: conversation(text) } : { prompt: text }),
    stream: true,
    stream_options: { include_usage: true },
    temperature: Number($("temperature").value || 0),
  };
  if ($("max-tokens").value) request.max_tokens = Number($("max-tokens").value);

  const abort = running = new AbortController();
  addMessage("user", text);
  const turn = { user: text, answer: "", state: "streaming", view: addMessage("assistant", "") };
  turns.push(turn);
  $("prompt").value = "";
  put($("announce"), "");
  busy(true);
  mark(turn, "streaming");
  const begun = performance.now();
  poll();                                              // from now on often
  try {
    const { usage, reason } = await receive(chat ? "/v1/chat/completions" : "/v1/completions", request, abort.signal, turn);
    const seconds = ((performance.now() - begun) / 1000).toFixed(1);
    let note = usage ? `${count(usage.completion_tokens, "token")} in ${seconds} s` : `${seconds} s`;
    if (reason === "length") note += ", ended at the token limit";
    mark(turn, "done", note);
  } catch (error) {
    if (abort.signal.aborted) mark(turn, "stopped", "Stopped");
    else fail(turn, error);
  }
  if (running === abort) {                             // not after New chat, which has begun something else
    running = null;
    busy(false);
    const said = { done: "Answer: ", stopped: "Stopped. ", failed: "Failed. " }[turn.state];
    put($("announce"), said + (turn.state === "failed" ? turn.view.note.textContent : turn.answer));
  }
  clientText();
  poll();
}

/** Reads the stream into the turn; throws unless it came to its proper end. */
async function receive(path, request, signal, turn) {
  const response = await api(path, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(request), signal,
  });
  const shown = turn.view.text.appendChild(new Text());
  let usage, reason;
  try {
    for await (const data of events(response)) {
      if (data === "[DONE]") return { usage, reason };
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Failure(chunk.error.message, chunk.error.code);
      usage = chunk.usage ?? usage;
      const choice = chunk.choices?.[0];
      reason = choice?.finish_reason ?? reason;
      const piece = choice?.delta?.content ?? choice?.text;
      if (!piece) continue;
      turn.answer += piece;
      shown.appendData(piece);
      turn.view.note.hidden = true;
      follow();
    }
  } catch (error) {
    if (error instanceof Failure || signal.aborted) throw error;
  }
  throw new Failure("The connection ended before the answer was complete.", "cut");
}

function mark(turn, to, note = "") {
  turn.state = turn.view.root.dataset.state = to;
  turn.view.note.hidden = !note;
  put(turn.view.note, note);
  follow();
}

function fail(turn, error) {
  mark(turn, "failed", error.message);
  if (error.status === 401) askKey(error.message);
  if (error.code === "context_length_exceeded") {
    if (state.model.chat) {
      turn.view.note.append(" Begin a new chat, or lower max tokens.",
        make("button", { type: "button", textContent: "New chat", onclick: newChat }));
    } else {
      turn.view.note.append(" Use a shorter text or fewer max tokens.");
    }
  }
  if (!$("prompt").value) $("prompt").value = turn.user;      // to send it again needs no typing
  follow(true);
}

function newChat() {
  running?.abort();
  running = null;
  turns = [];
  for (const message of document.querySelectorAll(".message")) message.remove();
  $("welcome").hidden = false;
  busy(false);
  clientText();
  put($("announce"), "New chat");
  $("prompt").focus();
}

// ---------------------------------------------------------------- live picture

function render() {
  const { model, last } = state;
  put($("model"), model.id);
  put($("network-label"), state.mode === "local" ? "Simulated network" : "Network");
  put($("network"), state.network);
  renderModel(model);
  renderTraffic(last);
  renderTime(last);
  for (const link of LINKS) renderSample(link);
  for (const party of PARTIES) put($(`at-${party}`), state.mode === "local" ? "" : ` ${state.parties[party]}`);
  clientText();
  const { totals, sessions, queue } = state;
  put($("totals"), `${count(totals.requests, "request")}, ${group(totals.failed)} failed; ${count(totals.prompt_tokens, "prompt token")} and `
    + `${count(totals.completion_tokens, "answer token")}; ${sessions.busy} of ${count(sessions.limit, "session")} busy, ${queue.waiting} waiting. Release ${state.release}.`);
  const turn = turns.at(-1);
  if (turn?.state === "streaming" && !turn.answer) {
    mark(turn, "streaming", queue.waiting ? `Waiting for a free session, ${queue.waiting} in the queue` : "The three parties compute your text");
  }
}

let known = "";

/** What changes with the model only: words of the chat, limits, the strip of layers. */
function renderModel(model) {
  const now = JSON.stringify([model, state.mode]);
  if (now === known) return;
  known = now;
  const text = model.chat ? "Message" : "Text to continue";
  put($("prompt-label"), text);
  $("prompt").placeholder = text;
  put($("welcome-mode"), [
    model.chat ? "" : "This model continues text: it writes on where yours ends, and each text stands by itself.",
    state.mode === "local" ? "Here all three run in one process: that shows the protocol and isolates nothing." : "",
  ].join(" ").trim());
  $("max-tokens").max = model.context;
  // A quarter of a short context leaves room for a few turns.
  $("max-tokens").value = Math.max(1, Math.min(256, Math.floor(model.context / 4)));

  const parts = [["embedding", model.private_embedding]];
  for (let i = 1; i <= model.layers; i++) parts.push([`layer ${i}`, i > model.public_layers]);
  parts.push(["final norm and head", model.private_head]);
  const kind = (hidden) => ({ part: hidden ? "private" : "public" });
  $("layers").classList.toggle("many", parts.length > 50);
  $("layers").replaceChildren(...parts.map(([name, hidden], i) => make("span", {
    title: `${name}: ${kind(hidden).part}`, className: i % (parts.length - 1) ? "" : "end", data: kind(hidden),
  })));
  $("layers").setAttribute("aria-label", `${model.layers} layers, ${model.layers - model.public_layers} of them private`);

  const range = (a, b) => (a > b ? [] : [a === b ? `layer ${a}` : `layers ${a} to ${b}`]);
  const legend = (hidden, layers, where) => {
    const list = [...(model.private_embedding === hidden ? ["embedding"] : []), ...layers,
      ...(model.private_head === hidden ? ["final norm and head"] : [])];
    return make("p", {}, make("i", { className: "key", data: kind(hidden) }),
      `${hidden ? "Private" : "Public"}: ${list.join(", ") || "none"}`,
      make("span", { className: "small", textContent: list.length ? `, ${where}` : "" }));
  };
  $("layers-note").replaceChildren(
    legend(false, range(1, model.public_layers), "computed by the Client in plaintext"),
    legend(true, range(model.public_layers + 1, model.layers), "computed by the three together"));
}

const FIELDS = ["online_bytes", "ahead_bytes", "messages"];
let before = {};       // totals at the last poll: a link is drawn as active when they have grown

function renderTraffic(last) {
  const tokens = last?.completion_tokens || 0;
  const sum = {};
  for (const link of LINKS) {
    const total = state.links[link], recent = last?.links?.[link];
    const row = document.querySelector(`tr[data-link="${link}"]`);
    for (const field of FIELDS) {
      const each = total && tokens ? (recent?.[field] || 0) / tokens : null, all = total ? total[field] || 0 : null;
      cell(row, `token_${field}`, each, total ? "–" : "not seen");
      cell(row, field, all, "");
      sum[`token_${field}`] = (sum[`token_${field}`] || 0) + (each || 0);
      sum[field] = (sum[field] || 0) + (all || 0);
    }
    renderLink(link, total, recent, tokens);
  }
  const foot = document.querySelector("tr[data-sum]"), partial = LINKS.some((link) => !state.links[link]);
  for (const field in sum) cell(foot, field, tokens || !field.startsWith("token_") ? sum[field] : null, "–");
  put(foot.cells[0], partial ? "All that the Client sees" : "All links");
  put($("parties-note"), (tokens ? "Bytes and messages (msg) per token of the answer in the newest request, its prompt included. Thicker lines carry more."
    : last ? "Bytes per token appear with the first token." : "No request yet.")
    + (partial ? " What Owner and Helper exchange, nobody else sees: it is not counted here." : ""));
}

function renderLink(link, total, recent, tokens) {
  const line = document.querySelector(`path[data-link="${link}"]`), label = document.querySelector(`[data-label="${link}"]`);
  const each = total && tokens ? ((recent?.online_bytes || 0) + (recent?.ahead_bytes || 0)) / tokens : null;
  put(label.children[0], !total ? "not seen" : each === null ? "" : bytes(each));
  put(label.children[1], each === null ? "" : `${number((recent?.messages || 0) / tokens)} msg`);
  for (const shape of [label, line]) shape.classList.toggle("unseen", !total);
  line.style.strokeWidth = 1.25 + (each > 10 ? 0.55 * (Math.log10(each) - 1) : 0);
  const sent = total?.messages ?? 0;
  line.classList.toggle("active", sent > (before[link] ?? sent));
  before[link] = sent;
}

/** A number for people, and as it is for tests. */
function cell(row, field, value, none) {
  const element = row.querySelector(`[data-field="${field}"]`);
  element.dataset.value = value ?? "";
  put(element, value === null ? none : field.endsWith("bytes") ? bytes(value) : number(value));
}

function renderTime(last) {
  const time = last?.time, whole = time ? time.compute_ms + time.wait_ms + time.network_ms : 0;
  for (const part of ["compute", "wait", "network"]) {
    const t = time?.[`${part}_ms`] ?? 0;
    document.querySelector(`.bar [data-part="${part}"]`).style.flexGrow = whole ? t / whole : 0;
    put(document.querySelector(`[data-time="${part}"]`), time ? ms(t) : "–");
    put(document.querySelector(`[data-share="${part}"]`), whole ? percent(t, whole) : "");
  }
  if (!last) return put($("time-note"), "No request yet.");
  const whose = state.mode === "local" ? "The Owner’s thread, the critical path." : "The Client’s thread.";
  put($("time-note"), `Prompt: ${ms(last.prefill_ms || 0)} for ${count(last.prompt_tokens, "token")}. `
    + `${last.decode_ms == null ? "" : `Answer: ${ms(last.decode_ms)} per token. `}${whose}`);
}

function renderSample(link) {
  const figure = document.querySelector(`figure[data-link="${link}"]`), detail = figure.querySelector("span");
  const sample = state.samples?.[link], shown = sample?.bytes || "";
  const canvas = figure.querySelector("canvas");
  canvas.classList.toggle("empty", !shown);
  if (!shown) put(detail, !(link in state.links) ? "not seen here" : state.last ? "short messages only: counts and single tokens" : "no request yet");
  if (figure.dataset.shown === shown) return;
  figure.dataset.shown = shown;
  const data = Uint8Array.from(atob(shown), (c) => c.charCodeAt(0));
  draw(canvas, data);
  if (!shown) return;
  const most = randomEntropy(data.length);
  put(detail, `${group(data.length)}\u00a0B\n${sample.entropy.toFixed(2)} bit per byte`
    + (most > 0 ? `\n${percent(sample.entropy, most)} of random` : ""));
}

/** One square a byte. A short sample gets larger squares (2, 4, 8 pixels), to be seen at all. */
function draw(canvas, data) {
  let side = 1;
  while (side * side < data.length && side < 32) side *= 2;
  const context = canvas.getContext("2d"), size = 32 / side;
  context.clearRect(0, 0, 32, 32);
  data.subarray(0, 1024).forEach((grey, i) => {
    context.fillStyle = `rgb(${grey} ${grey} ${grey})`;
    context.fillRect((i % side) * size, Math.floor(i / side) * size, size, size);
  });
}

/** The end of the conversation, beside the bytes that the others see. */
function clientText() {
  const turn = turns.at(-1), text = turn ? turn.answer || turn.user : "";
  $("client-text").parentElement.hidden = !text;
  put($("client-text"), text.length > 140 ? `… ${text.slice(-140).replace(/^\S*\s/, "")}` : text);
}

// ---------------------------------------------------------------- start

function build() {
  const column = (field) => make("td", {},
    make("span", { data: { field: `token_${field}` } }), make("span", { className: "hidden", textContent: " per token, " }),
    make("span", { data: { field } }), make("span", { className: "hidden", textContent: " in total" }));
  const row = (name, data) => make("tr", { data }, make("th", { scope: "row", textContent: name }), ...FIELDS.map(column));
  const arrow = (link) => link.split("->").map(title).join(" → ");
  $("links").tBodies[0].append(...LINKS.map((link) => row(arrow(link), { link })), row("All links", { sum: "" }));

  const picture = (link) => {
    const [from, to] = link.split("->").map(title);
    const canvas = make("canvas", { width: 32, height: 32, className: "empty", role: "img", ariaLabel: `Bytes from ${from} to ${to}, as grey squares` });
    return make("figure", { data: { link } }, canvas, make("figcaption", {}, make("b", { textContent: `From the ${from}` }), make("span")));
  };
  for (const party of PARTIES) {
    const figures = LINKS.filter((link) => link.endsWith(`>${party}`)).map(picture);
    const card = make("article", {}, make("h3", {}, title(party), make("span", { id: `at-${party}` })));
    if (party === "client") {
      card.append(make("blockquote", { hidden: true },
        make("span", { className: "small", textContent: "Only the Client sees this, the last message here:" }), make("p", { id: "client-text" })));
    }
    card.append(make("div", { className: "figures" }, ...figures));
    $("samples").append(card);
  }
}

function isDark() {
  return (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
}

document.addEventListener("DOMContentLoaded", () => {
  build();
  const nameTheme = () => put($("theme"), isDark() ? "Light theme" : "Dark theme");
  nameTheme();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
  $("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    store.set("localStorage", "theme", document.documentElement.dataset.theme);
    nameTheme();
  });

  $("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("prompt").addEventListener("keydown", (event) => {
    // While an input method composes, Enter belongs to it.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
  $("stop").addEventListener("click", () => running?.abort());
  $("new-chat").addEventListener("click", newChat);
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key = $("key").value.trim();
    store.set("sessionStorage", "key", key);
    $("key").value = "";
    poll().then(() => { if ($("key-form").hidden) $("prompt").focus(); });
  });
  document.addEventListener("visibilitychange", () => { if (document.hidden) clearTimeout(timer); else poll(); });
  poll();
});
