"use strict";
// The feature browser: a list of all latents of a run, of which only what is in sight is in the page, and one of them in
// full. What is known of them lies in the page in gzipped parts, which are unpacked when they are looked at.

const ROW = 46, LEVELS = 8, PARTS = new Map();
const SORTS = {
  varied: ["a varied choice", null], number: ["number", (d) => (a, b) => a - b],
  often: ["fires most", (d) => (a, b) => d.density[b] - d.density[a] || a - b],
  seldom: ["fires least", (d) => (a, b) => d.density[a] - d.density[b] || a - b],
  strong: ["largest maximum", (d) => (a, b) => d.max[b] - d.max[a] || a - b],
  alike: ["nearest neighbour", (d) => (a, b) => (d.near[b] ?? -1) - (d.near[a] ?? -1) || a - b],
  score: ["explanation's score", (d) => (a, b) => (d.said[b]?.[1] ?? -1) - (d.said[a]?.[1] ?? -1) || a - b],
};
const FILTERS = {
  all: ["any rate", () => true], live: ["fires at all", (x) => x > 0], dense: ["on more than 10 %", (x) => x > 0.1],
  usual: ["on 0.1 to 10 %", (x) => x > 0.001 && x <= 0.1], rare: ["on less than 0.1 %", (x) => x > 0 && x <= 0.001],
  never: ["never fires", (x) => x === 0],
};

async function unpacked(id) {
  const bytes = Uint8Array.from(atob(find(`#${id}`).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

async function part(run, number) {
  const id = `part-${run}-${number}`;
  if (!PARTS.has(id)) PARTS.set(id, unpacked(id));
  return PARTS.get(id);
}

class Browser {
  constructor(root) {
    this.root = root;
    for (const name of ["search", "sort", "filter", "run", "list", "count", "detail"]) this[name] = find(`#b-${name}`);
    this.rows = find(".rows", this.list);
    this.indexes = new Map();
    this.opened = null;
    this.chosen = [];
    this.search.addEventListener("input", () => this.choose());
    for (const one of [this.sort, this.filter]) one.addEventListener("change", () => this.choose());
    this.run.addEventListener("change", () => this.go(Number(this.run.value)));
    this.list.addEventListener("scroll", () => this.render(), {passive: true});
    addEventListener("resize", () => this.render());
    addEventListener("hashchange", () => this.follow());
    document.addEventListener("keydown", (event) => this.key(event));
    for (const [name, [title]] of Object.entries(FILTERS)) this.filter.append(new Option(title, name));
  }

  async start() {
    if (!(await this.follow())) await this.go(0);
    this.root.dataset.ready = "yes";
  }

  async follow() { // the link to a latent, if that is what the address says
    const said = new URLSearchParams(location.hash.slice(1)), latent = Number(said.get("latent") ?? NaN);
    const run = Number(said.get("run") ?? 1) - 1;
    if (!Number.isInteger(latent) || !find(`#index-${run}`)) return false;
    if (run === this.at && latent === this.opened) return true;
    await this.go(run, latent);
    find("#latents").scrollIntoView();
    return true;
  }

  async go(run, latent = null) {
    if (!this.indexes.has(run)) this.indexes.set(run, this.prepared(await unpacked(`index-${run}`)));
    this.at = run;
    this.data = this.indexes.get(run);
    this.run.value = String(run);
    const kept = this.sort.value, scored = Object.keys(this.data.said).length > 0;
    const names = Object.keys(SORTS).filter((name) => scored || name !== "score");
    this.sort.replaceChildren(...names.map((name) => new Option(SORTS[name][0], name)));
    this.sort.value = names.includes(kept) ? kept : "varied";
    this.choose();
    const there = latent !== null && latent >= 0 && latent < this.data.density.length;
    if (latent !== null && !there) this.missing(latent);
    else await this.open(there ? latent : this.chosen[0], there);
  }

  prepared(data) {
    data.words = new Map(data.ids.map((id, i) => [id, data.words[i]]));
    data.texts = data.density.map((_, latent) => {
      const tokens = [...data.tokens[latent], ...data.up[latent]].map((id) => plainText(data.words.get(id)));
      return `latent ${latent} ${tokens.join(" ")} ${data.said[latent]?.[0] ?? ""}`.toLowerCase();
    });
    return data;
  }

  choose() { // the latents that are asked for, in the order asked for
    if (!this.data) return; // still being unpacked
    const {data} = this, wanted = this.search.value.trim().toLowerCase(), passes = FILTERS[this.filter.value][1];
    const order = SORTS[this.sort.value][1];
    const every = order ? [...data.order].sort(order(data)) : data.order;
    const exact = /^\d+$/.test(wanted) ? Number(wanted) : null;
    this.chosen = every.filter((latent) => passes(data.density[latent]) && (!wanted || data.texts[latent].includes(wanted)));
    if (exact !== null) this.chosen.sort((a, b) => (b === exact) - (a === exact));
    this.count.textContent = this.chosen.length
      ? `${this.chosen.length.toLocaleString("en")} of ${data.order.length.toLocaleString("en")} latents`
      : `None of the ${data.order.length.toLocaleString("en")} latents matches.`;
    this.rows.style.height = `${this.chosen.length * ROW}px`;
    this.list.scrollTop = 0;
    this.render();
  }

  render() {
    const first = Math.max(0, Math.floor(this.list.scrollTop / ROW) - 4);
    const last = Math.min(this.chosen.length, Math.ceil((this.list.scrollTop + this.list.clientHeight) / ROW) + 4);
    this.rows.replaceChildren(...this.chosen.slice(first, last).map((latent, i) => this.row(latent, first + i)));
  }

  row(latent, place) {
    const {data} = this, row = make("div", latent === this.opened ? "row open" : "row");
    row.style.top = `${place * ROW}px`;
    row.role = "option";
    row.id = `row-${latent}`;
    row.ariaSelected = String(latent === this.opened);
    const words = make("span", "words"), said = data.said[latent]?.[0];
    if (said) words.append(make("em", "", said));
    for (const token of data.tokens[latent]) words.append(chip(data.words.get(token)), " ");
    const rate = make("span", "rate", data.density[latent] ? percent(data.density[latent]) : "never");
    row.append(make("span", "number", String(latent)), words, rate);
    row.addEventListener("click", () => this.open(latent));
    return row;
  }

  async open(latent, linked = false) {
    if (latent === undefined) return;
    this.opened = latent;
    const {at, data} = this, some = await part(at, Math.floor(latent / data.part));
    if (this.opened !== latent || this.at !== at) return; // another was opened meanwhile
    this.detail.replaceChildren(...detail(data, latent, some[latent % data.part], this));
    all("figure[data-chart]", this.detail).forEach(draw);
    if (linked || location.hash.startsWith("#latent=") || this.touched) history.replaceState(null, "", this.link(latent));
    this.touched = true;
    const place = this.chosen.indexOf(latent);
    if (place >= 0) {
      const top = place * ROW, {scrollTop, clientHeight} = this.list;
      const far = linked && (top < scrollTop || top + ROW > scrollTop + clientHeight);
      if (far) this.list.scrollTop = top - (clientHeight - ROW) / 2;
      else if (top < scrollTop) this.list.scrollTop = top;
      else if (top + ROW > scrollTop + clientHeight) this.list.scrollTop = top + ROW - clientHeight;
    }
    this.render();
    this.list.setAttribute("aria-activedescendant", `row-${latent}`);
  }

  missing(latent) {
    this.opened = null;
    this.detail.replaceChildren(make("p", "missing", `There is no latent ${latent}: they are 0 to ${this.data.density.length - 1}.`));
  }

  link(latent) { return `#latent=${latent}${this.at ? `&run=${this.at + 1}` : ""}`; }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest("input, select, textarea"), inside = event.target.closest("#b-list, #b-search");
    if (event.key === "/" && !typing) { event.preventDefault(); this.search.focus(); find("#latents").scrollIntoView(); return; }
    if (event.key === "Escape" && event.target === this.search) { this.list.focus(); return; }
    const arrows = {ArrowDown: 1, ArrowUp: -1}, letters = {j: 1, k: -1};
    const step = (inside && arrows[event.key]) || (!typing && letters[event.key]);
    if (!step) {
      if (event.key === "Enter" && event.target === this.search) this.open(this.chosen[0]);
      return;
    }
    event.preventDefault();
    const place = this.chosen.indexOf(this.opened);
    this.open(this.chosen[Math.min(this.chosen.length - 1, Math.max(0, place < 0 ? 0 : place + step))]);
  }
}

function detail(data, latent, one, browser) {
  const head = make("header"), title = make("h3"), link = make("a", "", `latent ${latent}`);
  link.href = browser.link(latent);
  link.title = "a link to this latent";
  title.append(link);
  const fires = make("p", "fires", one.f
    ? `fires on ${percent(data.density[latent])} of rows (${one.f.toLocaleString("en")}) · largest ${short(data.max[latent])} · mean ${short(one.m)}`
    : `never fired on ${data.rows.toLocaleString("en")} rows`);
  head.append(title, fires);
  const said = data.said[latent];
  if (said) {
    const told = make("blockquote", "", said[0] ?? "no explanation");
    told.append(make("small", "", ` score ${said[1] === null ? "–" : short(said[1], 3)}, of another latent's explanation ${said[2] === null ? "–" : short(said[2], 3)}`));
    head.append(told);
  }
  const contexts = make("div", "contexts");
  data.bands.forEach((name, band) => {
    const lines = one.t.filter((context) => context[0] === band);
    if (lines.length) contexts.append(bandOf(name, lines, data, latent));
  });
  const facts = make("div", "facts");
  if (one.h) facts.append(histogramOf(one, data));
  if (one.q.length) facts.append(tokensOf("fires most on", one.q, data, ([, times]) => percent(times / one.n)));
  if (one.u.length) facts.append(tokensOf("makes likelier", one.u, data, ([, weight]) => short(weight, 3)));
  if (one.v.length) facts.append(tokensOf("makes less likely", one.v, data, ([, weight]) => short(weight, 3)));
  const related = make("div", "facts");
  if (one.p.length) related.append(latentsOf("fires with", one.p, data, browser, ([, jaccard, phi, error]) =>
    [`${short(jaccard, 3)}${error ? ` ± ${short(error, 2)}` : ""}`, `Jaccard index of their rows; phi ${phi === null ? "undefined" : short(phi, 3)}`]));
  if (one.c.length) related.append(latentsOf("nearest directions", one.c, data, browser, ([, cosine]) => [short(cosine, 3), "cosine of decoder directions"]));
  return [head, facts, contexts, related];
}

function histogramOf(one, data) {
  const [first, ...counts] = one.h, x = counts.map((_, i) => i), edge = (i) => short(2 ** (data.lowest + (first + i) / data.octave), 2);
  const step = Math.max(1, Math.ceil(counts.length / 4));
  const ticks = x.filter((i) => i % step === 0).map((i) => [i - 0.5, edge(i)]);
  const names = x.map((i) => `${edge(i)} to ${edge(i + 1)}`);
  const figure = make("figure", "small");
  figure.dataset.chart = JSON.stringify({kind: "bars", x, ticks, names, height: 120, series: [{name: "firings", y: counts, colour: "bar"}]});
  figure.append(make("figcaption", "", "activations, logarithmic bins "), make("div", "plot"));
  figure.firstChild.append(make("output"));
  return figure;
}

function tokensOf(title, entries, data, value) {
  const box = make("div", "fact"), list = make("ul");
  for (const entry of entries) {
    const item = make("li");
    item.append(chip(data.words.get(entry[0])), make("small", "", value(entry)));
    list.append(item);
  }
  box.append(make("h4", "", title), list);
  return box;
}

function latentsOf(title, entries, data, browser, value) {
  const box = make("div", "fact"), list = make("ul");
  for (const entry of entries) {
    const item = make("li"), link = make("a", "", String(entry[0])), [text, meaning] = value(entry);
    link.href = browser.link(entry[0]);
    item.append(link, " ", make("small", "", text));
    item.title = meaning;
    const token = data.tokens[entry[0]]?.[0];
    if (token !== undefined) item.append(" ", chip(data.words.get(token)));
    list.append(item);
  }
  box.append(make("h4", "", title), list);
  return box;
}

function bandOf(name, contexts, data, latent) {
  const band = make("div", "band"), list = make("ol");
  for (const context of contexts) {
    const [, value, peak, position, document_, tokens, activations] = context, line = make("p"), item = make("li");
    const before = make("span"), left = make("span", "l"), right = make("span", "r");
    pieces(tokens.map((id) => data.words.get(id))).forEach((nodes, i) => {
      const shade = marked_(nodes, activations[i], data.max[latent], i === peak, tokens[i] === data.begin);
      (i < peak ? before : right).append(...shade);
    });
    left.append(before);
    line.append(left, right);
    item.title = `token ${position.toLocaleString("en")}, document ${document_.toLocaleString("en")}`;
    item.append(make("span", "v", short(value, 3)), line);
    list.append(item);
  }
  band.append(make("h5", "", name), list);
  return band;
}

function marked_(nodes, value, largest, peak, begins) { // shaded where the latent fires, faint where nobody looked
  const wrapped = (tag, kind, title) => {
    const element = make(tag, kind);
    if (title) element.title = title;
    element.append(...nodes);
    return [element];
  };
  if (value && largest > 0) {
    const level = Math.min(LEVELS, Math.max(1, Math.ceil((LEVELS * Math.abs(value)) / largest)));
    return wrapped("mark", `a${level}${value < 0 ? " minus" : ""}${peak ? " peak" : ""}`, short(value));
  }
  if (peak) return wrapped("mark", "peak");
  if (begins) return wrapped("i", "begin", "begin token");
  return value === null ? wrapped("i", "unseen", "not in the cache") : nodes;
}

drawAll();
if (find("#browser")) new Browser(find("#browser")).start();
