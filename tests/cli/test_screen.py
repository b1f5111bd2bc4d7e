"""What a person sees of several texts at once."""

import io

from isthmus.cli.screen import LiveScreen, open_screen
from isthmus.cli.table import table
from isthmus.cli.up import Waiting


def test_pipe_gets_whole_blocks_in_order():
    out = io.StringIO()
    with open_screen(out) as screen:
        screen.progress("sum", "8")
        screen.finished("sum", "What is 47 + 38?", "85")
    assert out.getvalue() == "sum           What is 47 + 38?\n              85\n"


def test_terminal_keeps_one_line_a_request_and_control_characters_out():
    out = io.StringIO()
    screen = LiveScreen(out, 40)
    screen.progress("a", "one\n\x1b[2Jtwo " * 20)
    screen.finished("b", "Q", "done")
    screen.close()
    drawn = out.getvalue()
    assert "\x1b[2J" not in drawn
    assert max(len(line) for line in drawn.splitlines()) < 60
    assert drawn.endswith("\x1b[A\r\x1b[J")


def test_table_aligns_columns():
    assert table(("name", "n"), [("a", "1"), ("bb", "22")], right=(1,)) == "name   n\n----  --\na      1\nbb    22\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_long_start_is_one_line_a_process_redrawn_and_cleared():
    out = Terminal()
    waiting = Waiting(out)
    waiting({"prefill-0": "it does not answer", "decode-0": "starting: weights loaded: 1,075 of 4,301 MiB"})
    drawn = out.getvalue()
    assert "prefill-0   it does not answer\n" in drawn
    assert f"decode-0    loading weights [{'#' * 7}{'.' * 23}] 1,075 of 4,301 MiB\n" in drawn
    waiting({})
    assert out.getvalue().removeprefix(drawn) == "\x1b[A\x1b[A\r\x1b[J"
    piped = io.StringIO()
    Waiting(piped)({"decode-0": "starting"})
    assert piped.getvalue() == ""
