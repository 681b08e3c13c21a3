"""Templates that would break out or never end, and what the commands may do on the machine: nothing but read and write files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sftdata.errors import UsageError
from sftdata.render.template import ChatTemplate, TemplateRefusal
from tests.torture.runs import ROOT, TOKENIZER, settings, write_chats
from tests.unit.test_template import BOMBS, ESCAPES
from tests.waiting import pace

pytestmark = pytest.mark.slow

HELLO = [{"role": "user", "content": "Hello"}]
# What a render may give instead of a refusal: nothing, or text that holds no secret.
MORE_ESCAPES = [
    "{{ ().__class__.__base__.__subclasses__() }}",
    "{{ [].__class__.__mro__[1].__subclasses__() }}",
    "{{ {}.__class__ }}",
    "{{ 1 .__class__ }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ messages[0].__class__ }}",
    "{{ messages[0].content.__class__.__mro__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__.os }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ raise_exception.__code__ }}",
    "{{ raise_exception.func_globals.x }}",
    "{{ strftime_now.__self__.__class__ }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f')|attr('mro') }}",
    "{{ ''['__cl' ~ 'ass__'].__mro__ }}",
    "{{ ''[['__class__']|first].__mro__ }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{0.__class__.__init__.__globals__}' | format(raise_exception) ~ '{0.__class__}'.format(messages) }}",
    "{{ ('{0.__class__.__mro__}'|attr('format'))('') }}",
    "{{ ('{a.__class__.__mro__}').format_map({'a': ''}) }}",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ f('') }}",
    "{{ ['{0.__class__.__mro__}']|map('format', '')|list ~ ''.__class__.__mro__ }}",
    "{{ messages|map(attribute='__class__')|map(attribute='__mro__')|list|first|first }}",
    "{{ messages|groupby('__class__')|first|attr('grouper')|attr('__mro__') }}",
    "{{ messages|sort(attribute='__class__.__mro__')|first|attr('__class__')|attr('__mro__') }}",
    "{{ messages.pop() }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages[0].setdefault('x', 1) }}",
    "{{ messages.extend([1]) }}",
    "{{ messages.sort() }}",
    "{{ messages.clear() }}",
    "{% import 'os' as os %}",
    "{% from 'x' import y %}",
    "{% extends 'base' %}",
    "{{ open('/etc/passwd').read() }}",
    "{{ __import__('os') }}",
    "{{ eval('1') }}",
    "{{ exec('1') }}",
    "{{ getattr(messages, '__class__') }}",
    "{{ config.items() }}",
    "{{ url_for.__globals__ }}",
    "{{ loop.__class__.__mro__ }}",
    "{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% set ns = namespace(a=1) %}{{ ns.__class__.__init__.__globals__ }}",
    "{{ namespace.mro() }}",
    "{{ dict.__class__.__mro__ }}",
    "{{ (messages|tojson).__class__.__mro__ }}",
    "{{ strftime_now('%Y').__class__.__mro__ }}",
    "{% generation %}{{ ''.__class__.__mro__ }}{% endgeneration %}",
    "{{ (x for x in messages).gi_frame }}",
]
SECRETS = ("object at 0x", "<class", "built-in", "function ", "root:", "uid=", "mro")


@pytest.mark.parametrize("source", [*ESCAPES, *MORE_ESCAPES])
def test_a_template_reaches_nothing_outside(source: str) -> None:
    messages = [dict(HELLO[0])]
    try:
        text = ChatTemplate(source).render(messages)
    except (TemplateRefusal, UsageError):
        text = ""
    assert not any(secret in text for secret in SECRETS), text[:500]
    assert messages == HELLO, "the data was changed"


def test_there_are_thirty_escapes_and_ten_bombs() -> None:
    assert len({*ESCAPES, *MORE_ESCAPES}) >= 30
    assert len(BOMBS) >= 10


def test_no_bomb_takes_long_or_512_megabytes() -> None:
    script = (
        "import json, re, sys, time\n"
        "from tests.waiting import pace\n"
        "from sftdata.render.template import ChatTemplate, TemplateRefusal\n"
        "def status(key): return int(re.search(key + r':\\s*(\\d+)', open('/proc/self/status').read())[1]) >> 10\n"
        "before, slowest, unit = status('VmRSS'), 0, pace()\n"
        "for source in json.load(sys.stdin):\n"
        "    begun = time.process_time()\n"
        "    try:\n"
        "        ChatTemplate(source).render([{'role': 'user', 'content': 'Hello'}])\n"
        "        raise SystemExit(source)\n"
        "    except TemplateRefusal:\n"
        "        slowest = max(slowest, (time.process_time() - begun) / unit)\n"
        "print(json.dumps([status('VmHWM') - before, slowest]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(BOMBS),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    megabytes, additions = json.loads(done.stdout)
    assert megabytes < 512
    assert additions < 12, "times ten million additions"


# -------------------------------------------------------------------------------------------------- on the machine

# What would run code that came with data, reach the network, or start a program.
FORBIDDEN = (
    *(
        "pickle.find_class",
        "socket.connect",
        "socket.bind",
        "socket.getaddrinfo",
        "ftplib.connect",
        "urllib.Request",
    ),
    *(
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.fork",
        "os.forkpty",
        "webbrowser.open",
    ),
)
WATCH = """
import sys
seen, opened = [], []
import sftdata.cli, sftdata.pipeline
def hook(event, arguments, forbidden=tuple(sys.argv.pop(1).split(","))):
    if event in forbidden:
        seen.append((event, repr(arguments)[:200]))
    if event == "open" and isinstance(arguments[0], str):
        opened.append((arguments[0], arguments[1] or ""))
sys.addaudithook(hook)
code = sftdata.cli.main(sys.argv[1:])
import json
print(json.dumps([code, seen, opened]), file=sys.stderr)
"""


def watched(*arguments: object) -> tuple[list[list[str]], list[list[str]]]:
    """Run a command under an audit hook; return the forbidden events and the files it opened: (path, mode)."""
    done = subprocess.run(
        [sys.executable, "-c", WATCH, ",".join(FORBIDDEN), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    code, seen, opened = json.loads(done.stderr.splitlines()[-1])
    assert code == 0, done.stderr
    return seen, opened


def test_no_command_unpickles_connects_or_starts_a_program(place: Path) -> None:
    data = write_chats(place / "chats.jsonl", 40)
    prepare = (
        "prepare",
        data,
        "-t",
        TOKENIZER,
        "--max-length",
        64,
        "--max-rejects",
        "50%",
        "--workers",
        1,
        "-o",
    )
    watched(*prepare, place / "first")  # from here on the tokenizer is in the cache
    commands = [
        (*prepare, place / "set"),
        ("verify", place / "set"),
        ("inspect", place / "set", "--row", 0),
        ("stats", place / "set"),
        ("audit", place / "set"),
        ("detect", data),
    ]
    for command in commands:
        seen, opened = watched(*command)
        assert not seen, command
        written = [
            path
            for path, mode in opened
            if set(mode) & set("wax+") and not path.startswith((str(place), "/dev/"))
        ]
        assert not written, command


def test_settings_are_plain_yaml(place: Path) -> None:
    """No tag of a settings file makes an object."""
    marker = place / "marker"
    (place / "run.yaml").write_text(
        f"inputs: !!python/object/apply:os.system ['touch {marker}']\ntokenizer: x\noutput: y\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "sftdata", "prepare", str(place / "run.yaml")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not marker.exists()


def test_a_template_in_a_run_that_never_ends_is_a_reject(place: Path) -> None:
    import sftdata
    from sftdata.errors import DataError

    data = write_chats(place / "chats.jsonl", 3, seed=1)
    (place / "bomb.jinja").write_text(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    begun = time.process_time()
    with pytest.raises(DataError, match="template"):
        sftdata.prepare(**settings(data, place / "set", chat_template=str(place / "bomb.jinja")))
    assert time.process_time() - begun < 80 * pace()
