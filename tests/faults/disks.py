"""Disks of the tests' own, on which something is wrong: small ones in memory, and one that meets an error.

Mounting needs root, or `sudo` without a password; without, or where the kernel forbids it, a test is skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SUDO = ("sudo", "-n") if os.geteuid() else ()


Mount = Callable[[Path, str], Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a file system in memory at a path of the test's."""
    mounted = []

    def mount_at(path: Path, options: str) -> Path:
        path.mkdir(exist_ok=True)
        own = f"{options},uid={os.geteuid()},mode=700"
        command = [*SUDO, "mount", "-t", "tmpfs", "-o", own, "tmpfs", str(path)]
        if sys.platform != "linux" or not succeeds(command):
            pytest.skip("no file system can be mounted here")
        mounted.append(path)
        return path

    yield mount_at
    for path in mounted:
        subprocess.run([*SUDO, "umount", "-l", str(path)], check=True)


def succeeds(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class FailingDisk:
    """A small ext4 that meets an error when it is told to, as a disk does that is wearing out."""

    def __init__(self, image: Path, mountpoint: Path) -> None:
        self._image = image
        self._mountpoint = mountpoint
        mountpoint.mkdir()
        with image.open("wb") as file:
            file.truncate(32 << 20)
        if not succeeds(["mkfs.ext4", "-q", "-E", f"root_owner={os.geteuid()}:{os.getegid()}", str(image)]):
            pytest.skip("no file system can be made here")
        self._mount()

    def _mount(self) -> None:
        options = ["-o", "loop,errors=remount-ro"]
        if not succeeds([*SUDO, "mount", *options, str(self._image), str(self._mountpoint)]):
            pytest.skip("no loop device can be mounted here")

    def fail(self) -> None:
        """Meet an error, after all that was written has reached the disk."""
        os.sync()
        device = subprocess.check_output(["findmnt", "-no", "SOURCE", str(self._mountpoint)], text=True)
        trigger = Path("/sys/fs/ext4", Path(device.strip()).name, "trigger_fs_error")
        assert succeeds([*SUDO, "sh", "-c", f"echo 1 > {trigger}"])
        with pytest.raises(OSError, match="Read-only"):
            (self._mountpoint / "probe").touch()

    def mend(self) -> None:
        """Do what an administrator does: unmount, repair, mount again."""
        self.unmount()
        # A copy: those who still have files of the old one open keep it as it is, aborted.
        self._image = Path(shutil.copy(self._image, self._image.with_suffix(".mended")))
        subprocess.run(["e2fsck", "-fy", str(self._image)], capture_output=True, check=False)
        self._mount()

    def unmount(self) -> None:
        subprocess.run([*SUDO, "umount", "-l", str(self._mountpoint)], check=False)


def fill(path: Path) -> Path:
    """Take all the room that there is."""
    filler = path / "filler"
    with filler.open("ab", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    assert os.statvfs(path).f_bavail == 0
    return filler
