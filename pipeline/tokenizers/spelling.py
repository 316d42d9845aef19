"""Spellings: vocabularies write bytes in one of several ways, and tables of them have names."""

import functools
import hashlib
import json
import re
from collections.abc import Callable
from typing import Any


def digest(parts: list[bytes]) -> str:
    """Name of a list of byte strings: 32 hex digits."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


def spell(style: Any) -> Callable[[str], bytes]:
    """Return what turns a vocabulary's entry into the bytes it stands for; `style` is its tokenizer.json's decoder."""
    written = json.dumps(style)
    if '"ByteLevel"' in written:
        return byte_level
    return word_piece if '"WordPiece"' in written else sentence_piece


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's table: the character that stands for a byte -> the byte.

    Printable bytes stand for themselves, the others for the characters from 256 on, in order (Radford et al. 2019).
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def byte_level(token: str) -> bytes:
    """An entry in GPT-2's alphabet, in which every byte has a printable character of its own."""
    table = byte_alphabet()
    return b"".join(bytes([table[c]]) if c in table else c.encode() for c in token)


def sentence_piece(token: str) -> bytes:
    """An entry of SentencePiece: a low line stands for a space, <0x0A> for a byte."""
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode()


def word_piece(token: str) -> bytes:
    """An entry of WordPiece: two hashes continue a word, anything else begins one."""
    return token[2:].encode() if token.startswith("##") else f" {token}".encode()
