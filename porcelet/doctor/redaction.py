"""Taking out of texts what is nobody else's business: secrets, people, and where this machine is.

Too much is taken rather than too little: what only looks like an address goes, too. Names of models, folders, proxies
and mirrors stay, as nobody could help without them.
"""

from __future__ import annotations

import getpass
import ipaddress
import re
import socket
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

SECRETS = r"password|passwd|passphrase|secret|token|api[_-]?key|private[_-]?key|credentials?"
SECRET_NAME = re.compile(rf"(?:{SECRETS})$", re.IGNORECASE)
COMMON = ("root", "localhost")  # names that tell nobody from anybody
URL = r"[A-Za-z][\w+.-]{1,20}://"
REST = r"[^\s\"'<>]"  # of a URL, as far as texts quote it

# Kind, pattern and what takes its place; earlier ones first.
FIXED = (
    ("keys", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*-----|\Z)", re.DOTALL), "<key>"),
    ("keys", re.compile(r"\bBearer\s+[\w.~+/=-]+", re.IGNORECASE), "Bearer <key>"),
    ("keys", re.compile(r"\b(?:sk-|hf_|ghp_|github_pat_|eyJ)[\w.-]{6,}"), "<key>"),
    ("passwords", re.compile(rf"({URL}){REST}*@"), r"\1<credentials>@"),
    ("queries", re.compile(rf"({URL}{REST}*?)\?{REST}+"), r"\1?<query>"),
    (
        "passwords",
        re.compile(rf"((?:{SECRETS})[\"']?\s*[=:]\s*)(?!<)(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s,;}}\]]+)", re.IGNORECASE),
        r"\1<secret>",
    ),
    ("e-mail addresses", re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+"), "<e-mail>"),
)
HOMES = re.compile(r"(/(?:home|Users)/)(?!<)[^/\s\"':,;]+")
ADDRESSES = re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)|[0-9A-Fa-f:]{2,39}(?![\w:]))")


@dataclass
class Redactor:
    """Takes things out and counts what. `user`, `host` and `home` are this machine's; empty ones are not looked for."""

    user: str = ""
    host: str = ""
    home: str = ""
    counts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of_this_machine(cls) -> Redactor:
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a container's user without a name
            user = ""
        return cls(user, socket.gethostname(), str(Path.home()))

    def text(self, text: str) -> str:
        """The text without what is private in it."""
        for kind, pattern, instead in FIXED:
            text = self._replace(kind, pattern, instead, text)
        if len(self.home) > 1:
            text = self._replace("home folders", re.compile(re.escape(self.home) + r"(?![\w.-])"), "~", text)
        text = self._replace("home folders", HOMES, r"\1<user>", text)
        for name in dict.fromkeys((self.host, self.host.partition(".")[0])):  # the whole one first
            text = self._name("host names", name, "<host>", text)
        text = self._name("user names", self.user, "<user>", text)
        return ADDRESSES.sub(self._address, text)

    def tree(self, value: object) -> object:
        """JSON's values, each text redacted; what a name calls a secret goes whole."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list | tuple):
            return [self.tree(one) for one in value]
        if isinstance(value, dict):
            return {name: self._entry(str(name), one) for name, one in value.items()}
        return value

    def _entry(self, name: str, value: object) -> object:
        if value and isinstance(value, str | int) and SECRET_NAME.search(name):
            self.counts["passwords"] += 1
            return "<secret>"
        return self.tree(value)

    def _replace(self, kind: str, pattern: re.Pattern[str], instead: str, text: str) -> str:
        text, number = pattern.subn(instead, text)
        self.counts.update({kind: number} if number else {})
        return text

    def _name(self, kind: str, name: str, instead: str, text: str) -> str:
        if len(name) < 2 or name in COMMON:
            return text
        pattern = re.compile(rf"(?<![A-Za-z0-9<]){re.escape(name)}(?![A-Za-z0-9])", re.IGNORECASE)
        return self._replace(kind, pattern, instead, text)

    def _address(self, match: re.Match[str]) -> str:
        try:
            address = ipaddress.ip_address(match[0])
        except ValueError:  # a version, a time
            return match[0]
        if address.is_loopback or address.is_unspecified:  # every machine's
            return match[0]
        self.counts["network addresses"] += 1
        return "<address>"
