"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const form = document.getElementById("filters"), cards = document.getElementById("cards");
  const more = document.getElementById("more"), count = document.getElementById("count");
  const fields = ["arm", "condition", "attempts", "min", "max", "q", ...(form.elements.colour ? ["colour"] : [])];
  const page = 12;
  let shown = page;

  const attempts = trial => trial.parts.filter(part => part[2]);
  const lastScore = trial => (attempts(trial).at(-1) || [])[1] ?? null;
  const text = trial =>
    [trial.prompt, trial.label || "", ...trial.parts.map(part => part[0])].join(" ").toLowerCase();
  const base = new Map(data.trials.filter(t => t.arm === "base").map(t => [t.cell, t]));

  const sums = data.trials.flatMap(trial => (trial.sums || []).map(token => token[1]));
  const lowest = sums.reduce((a, b) => Math.min(a, b), Infinity);
  const highest = sums.reduce((a, b) => Math.max(a, b), -Infinity);
  const bySum = () => form.elements.colour?.value === "sum";

  // Everything enters the page through textContent, so a response is never markup.
  function element(tag, className, content) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (content !== undefined) node.textContent = content;
    return node;
  }

  function fill(select, values, names) {
    select.append(new Option("any", ""), ...values.map(value => new Option(names[value] || value, value)));
  }

  function matches(trial, wanted) {
    const score = lastScore(trial), tries = attempts(trial).length, failed = trial.error !== null;
    if (wanted.arm && trial.arm !== wanted.arm) return false;
    if (wanted.condition && trial.condition !== wanted.condition) return false;
    if (wanted.attempts && (failed || Math.min(tries, 3) !== Number(wanted.attempts))) return false;
    if (wanted.min && (score === null || score < Number(wanted.min))) return false;
    if (wanted.max && (score === null || score > Number(wanted.max))) return false;
    if (wanted.colour && !trial.sums) return false;
    return !wanted.q || text(trial).includes(wanted.q.toLowerCase());
  }

  function summed(trial) {
    const words = element("div", "reply sum");
    const restarts = [];
    let at = 0, start = 0;
    for (const part of trial.parts) {
      if (part[2] && start) restarts.push(start);
      start += part[0].length;
    }
    for (const [content, value] of trial.sums || []) {
      while (restarts.length && restarts[0] <= at) { words.append(element("b", "", "│")); restarts.shift(); }
      const token = element("span", "", content);
      token.style.background = `rgba(213, 94, 0, ${(0.8 * (value - lowest) / (highest - lowest || 1)).toFixed(2)})`;
      token.title = value.toPrecision(3);
      words.append(token);
      at += content.length;
    }
    if (!trial.sums) words.append(...trial.parts.map(part => part[0]));
    return words;
  }

  function reply(trial) {
    const box = element("div"), who = element("div", "who arm-" + data.arms.indexOf(trial.arm));
    who.append(element("span", "dot"), trial.arm);
    const remarks = trial.flags.map(flag => flag.replaceAll("_", " "));
    if (trial.error !== null) remarks.push("unscored: " + trial.error);
    if (remarks.length) who.append(element("span", "flag", remarks.join(", ")));
    if (bySum()) { box.append(who, summed(trial)); return box; }
    const words = element("div", "reply");
    for (const [content, score, isAttempt] of trial.parts) {
      if (!isAttempt) { words.append(content); continue; }
      const shade = score === null ? "none" : "s" + Math.min(4, Math.floor(score / 20));
      let badge = element("span", "badge", score === null ? "?" : Math.round(score));
      // White space stays outside the colour, so that an empty line is empty.
      for (const piece of content.split(/(^\s+|\s*\n\s*|\s+$)/)) {
        if (!piece.trim()) { words.append(piece); continue; }
        const mark = element("mark", shade);
        if (badge) mark.append(badge);
        mark.append(piece);
        words.append(mark);
        badge = null;
      }
      if (badge) words.append(badge);
    }
    box.append(who, words);
    return box;
  }

  function card(trial) {
    const box = element("article", "card");
    box.dataset.arm = trial.arm;
    box.dataset.attempts = attempts(trial).length;
    const far = trial.strength === null
      ? `${trial.raw?.toPrecision(3)} × ${data.noun === "latent" ? "decoder row" : data.noun}`
      : `${trial.strength.toPrecision(2)} × residual norm`;
    const steering = trial.raw === null
      ? "unsteered"
      : `steered towards “${trial.label ?? `${data.noun} ${trial.latent}`}” (${data.noun} ${trial.latent}), ${far}`;
    box.append(element("h3", "", trial.prompt), element("div", "soft", steering));
    const pair = element("div", "pair"), partner = base.get(trial.cell);
    if (partner && partner !== trial) pair.append(reply(partner));
    pair.append(reply(trial));
    box.append(pair);
    return box;
  }

  function render() {
    const wanted = Object.fromEntries(fields.map(name => [name, form.elements[name].value]));
    const found = data.trials.filter(trial => matches(trial, wanted));
    cards.replaceChildren(...found.slice(0, shown).map(card));
    more.hidden = found.length <= shown;
    count.textContent = `${found.length} ${found.length === 1 ? "trial" : "trials"}` +
      (found.length > shown ? `, the first ${shown} shown` : "");
    count.dataset.found = found.length;
  }

  function toHash() {
    const kept = fields.filter(name => form.elements[name].value);
    const query = new URLSearchParams(kept.map(name => [name, form.elements[name].value]));
    history.replaceState(null, "", "#" + query);
  }

  function fromHash() {
    const query = new URLSearchParams(location.hash.slice(1));
    if (!fields.some(name => query.has(name))) return false;
    for (const name of fields) form.elements[name].value = query.get(name) || "";
    return true;
  }

  const arms = data.arms.filter(arm => data.trials.some(trial => trial.arm === arm));
  fill(form.elements.arm, arms, {});
  fill(form.elements.condition, [...new Set(data.trials.map(t => t.condition))], data.conditions);
  if (!fromHash()) {
    form.elements.arm.value = arms.includes("tuned") ? "tuned" : arms.find(arm => arm !== "base") || "";
    if (data.trials.some(trial => trial.condition === "steered")) form.elements.condition.value = "steered";
  }
  addEventListener("beforeprint", () => { for (const each of document.querySelectorAll("details.paper")) each.open = true; });
  form.addEventListener("input", () => { shown = page; toHash(); render(); });
  more.addEventListener("click", () => { shown += page; render(); });
  addEventListener("hashchange", () => { if (fromHash()) { shown = page; render(); } });
  render();
})();
