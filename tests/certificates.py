"""Certificates of a server that is to be trusted, and of some that are not, made by `openssl`."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_PAST = ("20200101000000Z", "20200201000000Z")
_NOW = ("20200101000000Z", "20991231235959Z")
_CONFIG = """
[ca]
default_ca = own
[own]
dir = {directory}
database = {directory}/index.txt
new_certs_dir = {directory}
rand_serial = yes
unique_subject = no
default_md = sha256
policy = any
copy_extensions = copy
[any]
commonName = supplied
"""


@dataclass(frozen=True)
class Certificates:
    """Who is what; each a server's context."""

    ca: Path
    """What a client must trust."""
    contexts: dict[str, ssl.SSLContext]
    """`good`, `expired`, `self_signed`, `wrong_host`."""


def make(directory: Path) -> Certificates:
    """Make a new authority and what it has signed, for 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command")
    (directory / "index.txt").touch()
    (directory / "ca.cnf").write_text(_CONFIG.format(directory=directory))
    _openssl(directory, *_REQUEST, "-x509", *_pair("ca"), "-subj", "/CN=tests", "-days", "3650")
    _openssl(directory, *_REQUEST, "-x509", *_pair("self_signed"), *_names("IP:127.0.0.1"), "-days", "3650")
    for name, names, times in (
        ("good", "IP:127.0.0.1", _NOW),
        ("expired", "IP:127.0.0.1", _PAST),
        ("wrong_host", "DNS:elsewhere.example", _NOW),
    ):
        _sign(directory, name, names, times)
    names_ = ("good", "expired", "self_signed", "wrong_host")
    return Certificates(directory / "ca.pem", {name: _context(directory, name) for name in names_})


_REQUEST = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def _pair(name: str) -> list[str]:
    return ["-keyout", f"{name}.key", "-out", f"{name}.pem"]


def _names(names: str) -> list[str]:
    return ["-subj", "/CN=server", "-addext", f"subjectAltName={names}"]


def _sign(directory: Path, name: str, names: str, times: tuple[str, str]) -> None:
    _openssl(directory, *_REQUEST, "-keyout", f"{name}.key", "-out", f"{name}.csr", *_names(names))
    command = ["ca", "-batch", "-config", "ca.cnf", "-cert", "ca.pem", "-keyfile", "ca.key", "-notext"]
    period = ["-startdate", times[0], "-enddate", times[1]]
    _openssl(directory, *command, *period, "-in", f"{name}.csr", "-out", f"{name}.pem")


def _context(directory: Path, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / f"{name}.pem", directory / f"{name}.key")
    return context


def _openssl(directory: Path, *arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
