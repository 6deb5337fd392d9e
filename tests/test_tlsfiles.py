"""Keys from files; tests/server/test_tls.py and tests/test_clienttls.py have the certificates."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdbm.errors import UsageError
from nbdbm.tlsfiles import MAX_FILE, parse_keys, read


class TestKeys:
    def test_good(self) -> None:
        text = "alice:00ff\n\nbob:aa:BB\n#c3bc:01\n"
        assert parse_keys("f", text) == {"alice": b"\0\xff", "bob:aa": b"\xbb", "ü": b"\1"}

    @pytest.mark.parametrize(
        ("text", "error"),
        [
            ("alice:00\nbob\n", "line 2: not NAME:KEY"),
            (":00\n", "line 1: not NAME:KEY"),
            ("alice:0\n", "line 1: not hexadecimal"),
            ("alice:secret\n", "line 1: not hexadecimal"),
            ("#xy:00\n", "line 1: not hexadecimal"),
            ("alice:\n", "line 1: a key of 0 bytes; it must have 1 to 256"),
            ("alice:" + "00" * 257, "line 1: a key of 257 bytes; it must have 1 to 256"),
            ("a:00\nb:00\na:01", "line 3: 'a' has a key already"),
            ("\n", None),
        ],
    )
    def test_bad(self, text: str, error: str | None) -> None:
        with pytest.raises(UsageError) as caught:
            parse_keys("keys.psk", text)
        assert str(caught.value) == ("keys.psk: holds no key" if error is None else f"keys.psk: {error}")
        assert "secret" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "keys"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match=f"not a file of at most {MAX_FILE} bytes"):
        read(str(pipe))
