"""Port, proxies, authorities and the hub: each finding with the fault it is there for."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from porcelet.doctor import authorities, network, proxy
from tests.doctor.machine import lay_out


def test_a_taken_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who listens there is a note: it may be our own server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr(network, "PORT", listener.getsockname()[1])
        assert network.port().state == "note" and "--port" in network.port().remedy
    assert network.port().state == "ok"


def test_the_network_is_asked_only_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection without --network or with HF_HUB_OFFLINE; a hub that does not answer is a problem."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert network.hub_access(False).state == "ok"
    refused = network.hub_access(True)
    assert refused.state == "problem" and "127.0.0.1:9 cannot be reached" in refused.cause and refused.remedy
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in network.hub_access(True).cause


def test_who_has_taken_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process listens there, and is named with its number; a connection to it takes no port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.getsockname()[1]
        monkeypatch.setattr(network, "PORT", number)
        assert network.port().cause.endswith(f"(process {os.getpid()})")
        with socket.create_connection(("127.0.0.1", number)) as client:
            assert not network.taker(client.getsockname()[1])


@pytest.mark.parametrize(
    ("command", "name"), [("/usr/bin/python3\0/opt/bin/porcelet\0serve\0", "porcelet"), ("nginx: master\0", "nginx")]
)
def test_our_own_server_is_told_from_others(tmp_path: Path, command: str, name: str) -> None:
    """What it was started with says whether it is ours, of which no more is shown."""
    table = "sl local_address rem_address st\n 0: 0100007F:1F40 00000000:0000 0A 0:0 00:0 0 0 0 4242 1 0\n"
    lay_out(tmp_path, {"proc/net/tcp6": table, "proc/77/cmdline": command, "proc/77/comm": f"{name}\n"})
    (tmp_path / "proc/77/fd").mkdir()
    (tmp_path / "proc/77/fd/3").symlink_to("socket:[4242]")
    assert network.taker(8000, tmp_path) == f"{name} (process 77)" and not network.taker(8001, tmp_path)


def test_no_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sandbox without a loopback interface nothing can listen."""

    def refuse(address: tuple[str, int]) -> None:
        raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))

    monkeypatch.setattr(socket, "create_server", refuse)
    found = network.port()
    assert found.state == "problem" and "Cannot assign" in found.cause and "loopback" in found.remedy


# ---- proxies --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*proxy.NAMES, "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in (*authorities.FILES, authorities.FOLDERS):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("value", ["http://proxy.lan:3128", "proxy.lan:3128", "http://me:secret@proxy.lan:3128/"])
def test_a_proxy(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """One that can be used is shown, without its password."""
    assert [finding.cause for finding in proxy.proxies()] == ["no proxy is set"]
    monkeypatch.setenv("HTTPS_PROXY", value)
    [found] = proxy.proxies()
    assert found.state == "ok" and "HTTPS_PROXY=http://proxy.lan:3128" in found.cause and "secret" not in found.cause


@pytest.mark.parametrize(
    "value",
    [
        "ftp://me:secret@proxy.lan:21",
        "http://me:secret@:3128",
        "http://me:secret@proxy.lan:port",
        "http://me:se/secret@proxy.lan:99999",
        "https//me:secret@proxy.lan",
        "http://me:secret@proxy.lan :3128",
        "http://me:secret@[::1:3128",
    ],
)
def test_a_proxy_that_is_none(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """A kind that nobody speaks, no host, no port: a problem that names the variable, never the password."""
    monkeypatch.setenv("https_proxy", value)
    [found] = proxy.proxies()
    assert found.state == "problem" and "https_proxy" in found.cause and "set https_proxy to" in found.remedy
    assert "secret" not in found.cause and proxy.address("https://hub.test") is None


def test_a_proxy_that_speaks_socks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes another package, which is named where it lacks."""
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    monkeypatch.setattr(proxy, "find_spec", lambda package: None)
    found = next(proxy.proxies())
    assert found.state == "problem" and found.remedy.startswith("pip install socksio")


def test_two_proxies_of_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capitals and small letters that differ: which one counts depends on the program."""
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@one.lan:1")
    monkeypatch.setenv("https_proxy", "http://two.lan:2")
    [found] = proxy.proxies()
    assert found.state == "note" and "differ; porcelet takes the second" in found.cause and "secret" not in found.cause


def test_a_proxy_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP_PROXY without NO_PROXY sends clients of our server to the proxy."""
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.lan:3128")
    [found] = proxy.proxies()
    assert found.state == "note" and found.remedy == "export NO_PROXY=localhost,127.0.0.1"
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    assert [finding.state for finding in proxy.proxies()] == ["ok"]


def test_a_proxy_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first hop is named, not the hub behind it; a host that NO_PROXY names has no such hop."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:secret@127.0.0.1:{free}")
    found = network.hub_access(True)
    assert found.state == "problem" and f"the proxy 127.0.0.1:{free} does not answer" in found.cause
    assert "HTTPS_PROXY" in found.remedy and "secret" not in found.cause
    monkeypatch.setenv("NO_PROXY", "hub.test")
    assert proxy.address("https://hub.test") is None


# ---- authorities ----------------------------------------------------------------------------------------------------

EXPIRED = """-----BEGIN CERTIFICATE-----
MIIBWTCB/6ADAgECAgEBMAoGCCqGSM49BAMCMBwxGjAYBgNVBAMMEUV4cGlyZWQg
YXV0aG9yaXR5MB4XDTIwMDEwMTAwMDAwMFoXDTIxMDEwMTAwMDAwMFowHDEaMBgG
A1UEAwwRRXhwaXJlZCBhdXRob3JpdHkwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNC
AARUZk+Cf3dHFBwYO58sjXEHW0/eTTOlCxO4w+JTyvoYRgzzLUDKxS4+p9C/Yhir
4TknochotD0vIe9oBF2hhQKFozIwMDAPBgNVHRMBAf8EBTADAQH/MB0GA1UdDgQW
BBQuBS/UtU8pjnJEkPVJsWPyUKD2eTAKBggqhkjOPQQDAgNJADBGAiEAhMjKtWL9
TWESWVOv9a+MCuOs8nlDzLJ2yqrfULgsppwCIQC+Y6h3agygwp0ZtD3m2wnNizCW
9H1Sec23zydpwKZyiA==
-----END CERTIFICATE-----
"""
DURING = 1_600_000_000.0  # in 2020, when it held


def test_an_authority_that_expired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named and who can help; on its day it was fine, and before that the clock was wrong."""
    file = tmp_path / "ca.pem"
    file.write_text(EXPIRED)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(file))
    [found] = authorities.certificates()
    assert found.state == "problem" and "Expired authority expired" in found.cause and found.remedy
    assert found.cause.startswith("SSL_CERT_FILE, REQUESTS_CA_BUNDLE=")
    [found] = authorities.certificates(now=DURING)
    assert found.state == "ok"
    [found] = authorities.certificates(now=0.0)
    assert found.state == "problem" and "do not hold yet" in found.cause and "clock" in found.remedy


@pytest.mark.parametrize(
    ("content", "said"), [(None, "No such file"), ("no certificate\n", "no certificate in PEM form"), ("", "PEM form")]
)
def test_a_file_without_authorities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, said: str
) -> None:
    """A file that is missing, empty or something else."""
    if content is not None:
        (tmp_path / "ca.pem").write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    [found] = authorities.certificates()
    assert found.state == "problem" and said in found.cause and "SSL_CERT_FILE" in found.remedy


def test_folders_of_authorities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSSL looks by hash alone: a folder of plainly named files is as good as empty."""
    (tmp_path / "ca.pem").write_text(EXPIRED)
    monkeypatch.setenv("SSL_CERT_DIR", f"{tmp_path}{os.pathsep}{tmp_path / 'missing'}")
    plain, missing = authorities.certificates()
    assert plain.state == missing.state == "problem"
    assert plain.remedy == f"openssl rehash {tmp_path}" and "No such file" in missing.cause
    (tmp_path / "0a1b2c3d.0").symlink_to(tmp_path / "ca.pem")
    assert next(authorities.certificates()).state == "ok"
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path))
    assert "is a folder" in next(authorities.certificates()).cause
