"""What is taken out of texts, and what stays."""

from __future__ import annotations

import pytest

from porcelet.doctor.redaction import Redactor

PRIVATE = {
    "keys": [
        "key sk-porcelet-ab12cd34ef-hunter2part_of-it",
        "Authorization: Bearer hunter2.abc/def==",
        "HF hf_hunter2abcdefgh",
        "-----BEGIN EC PRIVATE KEY-----\nhunter2\n-----END EC PRIVATE KEY-----\n",
        "cookie eyJhunter2abc.eyJhunter2.hunter2",
    ],
    "passwords": [
        "https_proxy=http://me:hunter2@proxy.lan:3128",
        "a password with a slash: http://me:SE/hunter2@proxy.lan",
        "database = postgresql+psycopg://u:hunter2@db/name",
        'password = "hunter2 and more"',
        "HF_TOKEN=hunter2",
        '{"api_key": "hunter2", "x": 1}',
        "api-key: hunter2",
    ],
    "queries": ["GET https://mirror.lan/model.gguf?X-Signature=hunter2&expires=5 failed"],
    "e-mail addresses": ["written by hunter2.person+lists@example.co.uk yesterday"],
    "home folders": ["/srv/people/hunter2/.cache/porcelet", "/home/hunter2/models/a.gguf", "/Users/hunter2"],
    "host names": ["on quiet-host.example.org", "on QUIET-HOST: refused"],
    "user names": ["owned by mallory", "/data/Mallory/models", "for mallory_models"],
    "network addresses": ["from 192.0.2.7:443", "(198.51.100.23)", "2001:db8::5ec", "fe80::1:2 answers"],
}
MARKS = ("hunter2", "quiet-host", "mallory", "192.0.2", "198.51", "db8", "fe80")


def redactor() -> Redactor:
    return Redactor(user="mallory", host="quiet-host.example.org", home="/srv/people/hunter2")


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in PRIVATE.items() for text in texts])
def test_what_is_private_goes_and_is_counted(kind: str, text: str) -> None:
    """Nothing of it is left, in running text and as a value of JSON, and its kind is counted."""
    ours = redactor()
    shown = ours.text(text)
    assert not any(mark in shown.lower() for mark in MARKS), shown
    assert set(ours.counts) == {kind} and ours.text(shown) == shown
    assert ours.tree({"x": [text, (text,)]}) == {"x": [shown, [shown]]}


@pytest.mark.parametrize(
    "text",
    [
        "prompt_tokens=12 cache_tokens: 4096, 3 tokens/s at 12:30:45",
        "torch 2.13.0+cu130, driver 550.54.15, kernel 6.1.0-18-amd64, 0000:01:00.0",
        "127.0.0.1:8000, ::1 and 0.0.0.0 are free; std::string",
        "https://huggingface.co/deepseek-ai/DeepSeek-R1",
        "POST /v1/chat/completions 200 in 0.123 s",
        "/root/.cache and localhost belong to root; ask-me and risk-free",
    ],
)
def test_what_helps_stays(text: str) -> None:
    """Counts, versions, times, this machine's own addresses and public names are left as they are."""
    ours = Redactor(user="root", host="localhost", home="/")
    assert ours.text(text) == text and not ours.counts


def test_a_host_goes_with_its_domain() -> None:
    """The whole name is one thing; the short one alone goes, too."""
    assert redactor().text("quiet-host.example.org, quiet-host") == "<host>, <host>"


def test_a_secret_by_its_name() -> None:
    """What a file calls a secret goes whole, whatever it looks like; what has no value shows that."""
    values = {"server": {"admin_password": "plain words", "api_key": 12345, "token": "", "max_tokens": 5}}
    assert redactor().tree(values) == {
        "server": {"admin_password": "<secret>", "api_key": "<secret>", "token": "", "max_tokens": 5}
    }
