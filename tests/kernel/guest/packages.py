"""Debian's packages, from the mirror that apt uses here: found, checked, unpacked; never installed.

*Trust.* InRelease is signed, names the SHA-256 of the package index, which names that of each
package. All three are checked (the signature by ``gpgv`` or ``sqv``, whichever apt brought along).
"""

from __future__ import annotations

import functools
import hashlib
import lzma
import re
import shlex
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.kernel.guest.ending import Exit, Failure, note
from tests.kernel.guest.host_tools import DPKG_DEB, apt_get_install, located

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

NETWORK_SECONDS_MAX = 60.0


@dataclass(frozen=True, kw_only=True)
class Package:
    """What the index says of one .deb: its place under the mirror, and the digest it must have."""

    name: str
    filename: str
    sha256: str


def apt_source_files() -> Iterator[Path]:
    """apt's own source files, where apt's configuration says that they are."""
    answer = subprocess.run(
        ["apt-config", "shell", "F", "Dir::Etc::sourcelist/f", "D", "Dir::Etc::sourceparts/d"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for assignment in shlex.split(answer):
        name, _, value = assignment.partition("=")
        if name == "F":
            yield Path(value)
        else:
            yield from sorted(Path(value).glob("*.list"))
            yield from sorted(Path(value).glob("*.sources"))


def one_line_uris(text: str) -> Iterator[str]:
    """The URIs of a .list file: ``deb [options] URI suite component...``."""
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[[^]]*\]\s*)?(\S+)\s", line)
        if match:
            yield match[1]


def deb822_uris(text: str) -> Iterator[str]:
    """The URIs of a .sources file: stanzas of fields, which may go on over indented lines."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for stanza in re.split(r"\n[ \t]*\n", "\n".join(lines)):
        fields = {
            match[1].lower(): match[2].split() for match in re.finditer(r"(?m)^([\w-]+):((?:.*)(?:\n[ \t].*)*)", stanza)
        }
        enabled = "".join(fields.get("enabled", ["yes"])).lower() not in ("no", "false", "0")
        if enabled and "deb" in fields.get("types", []):
            yield from fields.get("uris", [])


def mirrors() -> list[str]:
    """Base URIs of the mirrors that apt uses, those that look like Debian's main archive first."""
    uris: list[str] = []
    try:
        for path in apt_source_files():
            parse = deb822_uris if path.suffix == ".sources" else one_line_uris
            if path.is_file():
                uris += parse(path.read_text(encoding="utf-8"))
    except (OSError, subprocess.CalledProcessError) as error:
        raise Failure(Exit.HOST_NOT_READY, f"apt's sources cannot be read ({error})") from error
    usable = [uri.rstrip("/") for uri in uris if re.match(r"https?://", uri)]
    return sorted(dict.fromkeys(usable), key=lambda uri: not uri.endswith("/debian"))


def download(uri: str, sha256: str | None = None) -> bytes:
    """The bytes at `uri`, of that digest if one is given."""
    with urllib.request.urlopen(uri, timeout=NETWORK_SECONDS_MAX) as response:
        data: bytes = response.read()
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        why = "its SHA-256 is not the one that the signed index gives: run it again"
        raise Failure(Exit.HOST_NOT_READY, f"{uri} was damaged on the way, {why}")
    return data


def find_mirror(suite: str) -> tuple[str, bytes]:
    """The first mirror that has `suite`, and the suite's InRelease."""
    tried = []
    for mirror in mirrors():
        try:
            return mirror, download(f"{mirror}/dists/{suite}/InRelease")
        except OSError as error:
            tried.append(f"{mirror}: {error}")
    why = "; ".join(tried) or "apt has no http or https source of type deb"
    mend = "check the network, the proxy settings and apt's sources"
    raise Failure(Exit.HOST_NOT_READY, f"no mirror gives the suite {suite} ({why}): {mend}")


def signed_text(in_release: bytes, suite: str) -> str:
    """The text of InRelease, as far as one of Debian's archive keys has signed it."""
    gpgv, sqv = shutil.which("gpgv"), shutil.which("sqv")
    if not KEYRING.exists() or (gpgv is None and sqv is None):
        mend = apt_get_install(["gpgv", "debian-archive-keyring"])
        raise Failure(Exit.HOST_NOT_READY, f"nothing here can check a signature: run `{mend}`")
    with tempfile.TemporaryDirectory(prefix="ublk_trio-") as directory:
        message, text = Path(directory) / "InRelease", Path(directory) / "Release"
        message.write_bytes(in_release)
        if gpgv is not None:
            command = [gpgv, "--status-fd", "1", "--keyring", str(KEYRING)]
            command += ["--output", str(text), str(message)]
        else:
            command = [str(sqv), "--keyring", str(KEYRING), "--output", str(text)]
            command += ["--cleartext", str(message)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        # gpgv also fails when just one of several signatures is by a key that is newer than the
        # keyring of this release.
        good = result.returncode == 0
        if gpgv is not None:
            good = "[GNUPG:] VALIDSIG" in result.stdout and "BADSIG" not in result.stdout
        if not good or not text.exists():
            why = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            mend = "update the package debian-archive-keyring, or mistrust the mirror"
            raise Failure(Exit.HOST_NOT_READY, f"{suite}'s signature is not good ({why}): {mend}")
        return text.read_text(encoding="utf-8")


@functools.cache
def suite_packages(suite: str) -> tuple[str, str]:
    """A mirror, and the text of the suite's package index."""
    mirror, in_release = find_mirror(suite)
    release = signed_text(in_release, suite)
    match = re.search(r"(?m)^ ([0-9a-f]{64}) +\d+ main/binary-amd64/Packages\.xz$", release)
    if match is None:
        raise Failure(Exit.HOST_NOT_READY, f"{mirror} has no amd64 package index for {suite}")
    # By digest and not by name: a mirror that changes between two requests still matches.
    place = f"{mirror}/dists/{suite}/main/binary-amd64/by-hash/SHA256/{match[1]}"
    return mirror, lzma.decompress(download(place, match[1])).decode("utf-8")


def package_of(name: str, stanza: str) -> Package:
    fields = dict(re.findall(r"(?m)^(Filename|SHA256): (\S+)$", stanza))
    return Package(name=name, filename=fields["Filename"], sha256=fields["SHA256"])


def unpack(mirror: str, package: Package, root: Path) -> None:
    note(f"fetching {package.name}")
    archive = root / "package.deb"
    archive.write_bytes(download(f"{mirror}/{package.filename}", package.sha256))
    subprocess.run([located(DPKG_DEB), "-x", archive, root], check=True, capture_output=True)
    archive.unlink()
