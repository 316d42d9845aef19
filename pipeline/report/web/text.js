"use strict";
// Bytes of tokens as text. A character split over tokens stands where it is complete; bytes that are no text are shown as
// hexadecimal digits; line ends, tabs, runs of blanks and invisible characters as faint signs. All of it is text nodes.

const SIGNS = {"\n": "↵", "\r": "␍", "\t": "⇥"};
const HIDDEN = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cn}\p{Co}]/u;
const strict = new TextDecoder("utf-8", {fatal: true});
const hex = (bytes) => (bytes.length ? bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" ") : "∅");
const raised = (number) => String(number).replace(/\d/g, (digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]);

function complete(bytes) { // the character that bytes make; null where they make none, undefined where more are needed
  const first = bytes[0];
  const length = first < 0x80 ? 1 : first >= 0xc2 && first < 0xe0 ? 2 : first >= 0xe0 && first < 0xf0 ? 3 : first >= 0xf0 && first < 0xf5 ? 4 : 0;
  if (!length) return null;
  if (bytes.slice(1).some((byte) => byte < 0x80 || byte > 0xbf)) return null;
  if (bytes.length < length) return undefined;
  try { return strict.decode(new Uint8Array(bytes)); } catch { return null; }
}

function decoded(tokens) { // each token (a string of bytes) as a list of characters and of lists of bytes that are none
  const found = tokens.map(() => []);
  let waiting = [];
  const settle = (into) => { // what waits as far as it is decided
    while (waiting.length) {
      const character = complete(waiting);
      if (character === undefined) return;
      if (character !== null) { into.push(character); waiting = []; return; }
      into.push([waiting.shift()]);
    }
  };
  tokens.forEach((token, i) => {
    for (const byte of token) { waiting.push(byte.charCodeAt(0)); settle(found[i]); }
  });
  for (const byte of waiting) found.at(-1).push([byte]);
  return found.map((parts, i) => (parts.length ? parts : [[...tokens[i]].map((byte) => byte.charCodeAt(0))]));
}

function shown(parts) { // nodes of one token
  const nodes = [];
  let plain = "";
  const flush = () => { if (plain) nodes.push(document.createTextNode(plain)); plain = ""; };
  const sign = (tag, text) => { flush(); nodes.push(make(tag, "", text)); };
  for (let i = 0; i < parts.length; i++) {
    const part = parts[i];
    if (Array.isArray(part)) { sign("b", hex(part)); continue; }
    let run = 0;
    while (parts[i + run] === " ") run++;
    if (run > 1) { sign("s", run === 2 ? "··" : `·${raised(run)}`); i += run - 1; } // indentation is told, not drawn
    else if (SIGNS[part]) sign("s", SIGNS[part]);
    else if (HIDDEN.test(part)) sign("b", `U+${part.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`);
    else plain += part;
  }
  flush();
  return nodes;
}

const pieces = (tokens) => decoded(tokens).map(shown);

function chip(token) { // a token by itself
  const element = make("code");
  element.append(...pieces([token])[0]);
  return element;
}

const plainText = (token) => decoded([token])[0].map((part) => (Array.isArray(part) ? hex(part) : part)).join("");
