"""Programs and designs that attack the evaluation: each ends in its category, none passes, harms or stays.

All run together, as a file of samples would, and each is bounded in itself, so that a broken sandbox fails a test and
not the machine.
"""

import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from ibft.evaluate import python_verdict, verilog_verdict
from ibft.evaluate.problems import Problem
from ibft.evaluate.python_verdict import Verdict
from ibft.evaluate.sandbox import Limits, Sandbox

LIMITS = Limits(wall_seconds=10, cpu_seconds=2, memory_mib=512, file_mib=8, processes=24)
SQUARE = Problem(
    "square",
    "python",
    'def f(x):\n    """The square."""\n',
    "    return x * x\n",
    test="def check(candidate):\n    for x in range(-3, 4):\n        assert candidate(x) == x * x, x\n",
    entry_point="f",
)


class Attack(NamedTuple):
    """A source, and the categories that it may end in."""

    source: str
    categories: set[str]


def attack(source: str, *categories: str) -> Attack:
    return Attack(source, set(categories))


WRONG, RAISED = "wrong_output", "runtime_error"
LIBC = """import ctypes, platform
libc = ctypes.CDLL(None)
KEY = {"x86_64": 248, "aarch64": 217}[platform.machine()]
def done(result):
    if result < 0: raise OSError
    return 7
"""
PYTHON = {
    # leaving before the tests are over
    "exit_when_loaded": attack("import os\nos._exit(0)", RAISED),
    "exit_when_called": attack("import os\ndef f(x):\n    os._exit(0)", RAISED),
    "system_exit": attack("raise SystemExit(0)", RAISED),
    "system_exit_in_call": attack("import sys\ndef f(x):\n    sys.exit(0)", RAISED),
    "exit_at_exit": attack("import atexit, os\natexit.register(os._exit, 0)\ndef f(x):\n    raise SystemExit", RAISED),
    "crash": attack("import ctypes\ndef f(x):\n    ctypes.string_at(0)", RAISED),
    "kill_itself": attack("import os, signal\ndef f(x):\n    os.kill(os.getpid(), 9)\n    os.abort()", RAISED),
    # objects that lie
    "equal_to_everything": attack(
        "class E:\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x):\n    return E()", WRONG
    ),
    "int_equal_to_everything": attack(
        "class E(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
        "    __index__ = lambda self: 9\n"
        "def f(x):\n    return E(7)",
        WRONG,
    ),
    "float_equal_to_everything": attack(
        "class E(float):\n    def __eq__(self, other): return True\n    def hex(self): return '0x9p0'\n"
        "def f(x):\n    return E('nan')",
        WRONG,
    ),
    "metaclass": attack(
        "class M(type):\n    def __eq__(self, other): return True\n    def mro(cls): return [cls, int, object]\n"
        "    __hash__ = type.__hash__\nclass E(int, metaclass=M): pass\ndef f(x):\n    return E",
        WRONG,
    ),
    "nan": attack("def f(x):\n    return float('nan')", WRONG),
    "infinite_generator": attack("def f(x):\n    while True:\n        yield x * x", WRONG, "timeout"),
    "nested_deep": attack("def f(x):\n    a = []\n    for _ in range(5000): a = [a]\n    return a", WRONG),
    "nested_in_itself": attack("def f(x):\n    a = []\n    a.append(a)\n    return a", WRONG),
    "nested_wide": attack(
        "def f(x):\n    a = [1]\n    for _ in range(90): a = [a, a]\n    return a", WRONG, "memory", "timeout"
    ),
    "huge_result": attack("def f(x):\n    return 'x' * 50_000_000", WRONG, "memory"),
    "huge_number": attack("def f(x):\n    return 1 << 3_000_000", WRONG),
    # changing the rules
    "patched_builtins": attack(
        "import builtins\nbuiltins.AssertionError = Exception\n"
        "builtins.exec = builtins.compile = lambda *a, **k: None\n"
        "builtins.type = lambda v: bool\nbuiltins.isinstance = lambda *a: True\ndef f(x):\n    return 7",
        WRONG,
        RAISED,
    ),
    "patched_json": attack(
        'import json\njson.dumps = lambda *a, **k: \'["passed", ""]\'\ndef f(x):\n    return 7', WRONG, RAISED
    ),
    "patched_stack": attack(
        "import sys\nframe = sys._getframe()\nwhile frame:\n"
        "    frame.f_globals.update(checker=lambda *a: ['passed', ''], _run_tests=lambda *a: None)\n"
        "    frame = frame.f_back\ndef f(x):\n    return 7",
        WRONG,
    ),
    "own_check": attack("def check(candidate): pass\ndef f(x):\n    return 7", WRONG),
    "stop_iteration": attack("def f(x):\n    raise StopIteration", RAISED),
    "generator_exit": attack("def f(x):\n    raise GeneratorExit", RAISED),
    "assertion": attack("def f(x):\n    raise AssertionError", RAISED),
    # forged words
    "forged_verdict": attack("print('[\"passed\", \"\"]', flush=True)\ndef f(x):\n    print('passed')", WRONG),
    "forged_verdict_to_every_file": attack(
        'import os\nfor n in range(256):\n    try: os.write(n, b\'["passed", ""]\\n\')\n    except OSError: pass\n'
        "def f(x):\n    return 7",
        RAISED,
    ),
    "forged_frame": attack(
        'import os, struct\nw = b\'{"ready": true, "passed": true, "call": 9}\'\nfor n in range(3, 256):\n'
        "    try: os.write(n, struct.pack('!I', len(w)) + w)\n    except OSError: pass\ndef f(x):\n    return 7",
        RAISED,
    ),
    "frame_without_end": attack(
        "import os\nfor n in range(3, 256):\n    try: os.write(n, b'\\xff' * 64)\n    except OSError: pass", RAISED
    ),
    "frame_nested": attack(
        "import os, struct\nw = b'[' * 900_000\nfor n in range(3, 256):\n"
        "    try: os.write(n, struct.pack('!I', len(w)) + w)\n    except OSError: pass",
        RAISED,
    ),
    "other_process_memory": attack(
        "import os\ndef f(x):\n    for pid in os.listdir('/proc'):\n"
        "        if pid.isdigit() and int(pid) != os.getpid():\n"
        "            open(f'/proc/{pid}/mem', 'r+b')\n    return 7",
        WRONG,
        RAISED,
    ),
    # taking what others need
    "endless": attack("def f(x):\n    while True: pass", "timeout"),
    "asleep": attack("import time\ndef f(x):\n    time.sleep(60)", "timeout"),
    "signals_trapped": attack(
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\n"
        "def f(x):\n    while True: pass",
        "timeout",
    ),
    "recursion": attack("def f(x):\n    return f(x)", RAISED),
    "memory": attack("def f(x):\n    kept = []\n    while len(kept) < 512: kept.append(bytearray(1 << 24))", "memory"),
    "memory_of_many": attack(
        "import os, time\ndef f(x):\n    for _ in range(8):\n        if os.fork() == 0:\n"
        "            kept = b'x' * (1 << 28)\n            time.sleep(9)\n            os._exit(0)\n"
        "    time.sleep(30)",
        "memory",
    ),
    "forks": attack(
        "import os, time\ndef f(x):\n    for _ in range(500):\n        if os.fork() == 0:\n"
        "            time.sleep(9)\n            os._exit(0)\n    return 7",
        RAISED,
    ),
    "forks_that_fork": attack(
        "import os, time\nend = time.time() + 60\ndef f(x):\n    for _ in range(9):  # 512 at most\n"
        "        try: os.fork()\n        except OSError: pass\n    while time.time() < end: pass",
        "timeout",
        RAISED,
    ),
    "threads": attack(
        "import threading, time\ndef f(x):\n    for _ in range(500):\n"
        "        threading.Thread(target=time.sleep, args=(9,)).start()",
        RAISED,
    ),
    "output": attack("def f(x):\n    for _ in range(20_000): print('x' * 100_000)", "output_limit"),
    "error_output": attack(
        "import os\ndef f(x):\n    for _ in range(20_000): os.write(2, b'x' * 100_000)", "output_limit"
    ),
    "file": attack(
        "def f(x):\n    with open('large', 'wb') as file:\n        for _ in range(500): file.write(bytes(1 << 20))",
        RAISED,
    ),
    "hashes_that_collide": attack(
        "def f(x):\n    return {n * (2**61 - 1): 0 for n in range(60_000)}", WRONG, "timeout"
    ),
    "words_that_do_not_end": attack(
        "class E(Exception):\n    def __str__(self):\n        while True: pass\ndef f(x):\n    raise E", "timeout"
    ),
    "files_in_memory": attack(
        "import os\ndef f(x):\n    for n in range(100):\n        os.write(os.memfd_create(str(n)), bytes(1 << 23))\n"
        "    return 7",
        RAISED,
    ),
    "segments_in_memory": attack(LIBC + "def f(x):\n    return done(libc.shmget(0, 1 << 26, 0o1600))", RAISED),
    "keys": attack(
        LIBC + "def f(x):\n    return done(libc.syscall(KEY, b'user', b'k', b'x' * 9000, 9000, -4))", RAISED
    ),
    # reaching outside
    "vsock": attack("import socket\ndef f(x):\n    socket.socket(40, socket.SOCK_STREAM)\n    return 7", RAISED),
    "own_user_namespace": attack(LIBC + "def f(x):\n    return done(libc.unshare(0x10000000))", RAISED),
    "own_user_namespace_of_a_child": attack(
        "import subprocess\ndef f(x):\n    subprocess.run(['unshare', '-U', 'true'], check=True)\n    return 7", RAISED
    ),
    "ring_of_calls": attack(LIBC + "def f(x):\n    return done(libc.syscall(425, 8, bytes(120)))", RAISED),
    "memory_of_the_host": attack("def f(x):\n    open('/dev/shm/left', 'w')\n    return 7", RAISED),
    "peer_of_the_socket": attack(
        "import os, signal, socket\ndef f(x):\n    for n in range(3, 64):\n        try: s = socket.socket(fileno=n)\n"
        "        except OSError: continue\n        peer = s.getsockopt(socket.SOL_SOCKET, 77)\n        s.detach()\n"
        "        signal.pidfd_send_signal(peer, signal.SIGKILL)\n    return 7",
        RAISED,
    ),
    "write_outside": attack("open('{canary}', 'w').write('harmed')\ndef f(x):\n    return 7", RAISED),
    "write_to_system": attack("open('/usr/lib/harmed', 'w')\ndef f(x):\n    return 7", RAISED),
    "link_outside": attack(
        "import os\nos.symlink('{canary}', 'link')\nopen('link', 'a').write('harmed')\ndef f(x):\n    return 7", RAISED
    ),
    "link_upwards": attack(
        "import os\nos.symlink('/', 'up')\nos.remove('up{canary}')\ndef f(x):\n    return 7", RAISED
    ),
    "read_outside": attack("print(open('{canary}').read())\ndef f(x):\n    return 7", RAISED),
    "network": attack(
        "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)\ndef f(x):\n    return 7", RAISED
    ),
    "network_names": attack("import socket\nsocket.getaddrinfo('example.org', 80)\ndef f(x):\n    return 7", RAISED),
    "kill_everyone": attack(
        "import os, signal\ndef f(x):\n    for pid in [os.getppid(), -1, {pid}]:\n"
        "        try:\n            if pid: os.kill(pid, signal.SIGKILL)\n        except OSError: pass\n    return 7",
        WRONG,
        RAISED,
    ),
    # staying
    "thread_left": attack(
        "import threading\ndef loop():\n    while True: pass\ndef f(x):\n    threading.Thread(target=loop).start()\n"
        "    return 7",
        WRONG,
    ),
    "process_left": attack(
        "import os, time\ndef f(x):\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n"
        "            time.sleep(300)\n        os._exit(0)\n    return 7",
        WRONG,
    ),
    "zombies": attack(
        "import os\ndef f(x):\n    for _ in range(10):\n        if os.fork() == 0: os._exit(0)\n    return 7", WRONG
    ),
    "files_left": attack(
        "import os\nfor _ in range(2000):\n    os.mkdir('d')\n    os.chdir('d')\nopen('deep', 'w')\nos.chmod('.', 0)\n"
        "def f(x):\n    return 7",
        WRONG,
    ),
}

BENCH = """`timescale 1 ps/1 ps
module reference_module(input a, input b, output y);
  assign y = a & b;
endmodule
module stimulus_gen(input clk, output reg a, output reg b);
  initial begin
    {a, b} = 0;
    repeat (20) @(posedge clk) {a, b} <= $random;
    #1 $finish;
  end
endmodule
module tb();
  typedef struct packed { int errors; int clocks; } stats;
  stats stats1;
  reg clk = 0;
  initial forever #5 clk = ~clk;
  wire a, b, y_ref, y_dut;
  stimulus_gen stim1 (.clk, .a, .b);
  reference_module good1 (.a, .b, .y(y_ref));
  top_module top_module1 (.y(y_dut), .*);
  task clear; stats1.errors = 0; endtask
  initial begin : watch
    reg good;
    forever begin good = y_ref; @(y_ref); end
  end
  always @(posedge clk, negedge clk) begin
    stats1.clocks++;
    if (y_ref !== y_dut) stats1.errors++;
  end
  final $display("Mismatches: %1d in %1d samples", stats1.errors, stats1.clocks);
endmodule
"""
HEADER = "module top_module(input a, input b, output y);\n"
AND = Problem("and", "verilog", HEADER, "  assign y = a & b;\nendmodule\n", test=BENCH)
NOTHING = "  assign y = 0;\n"
CLEARING = " always @(a, b) tb.stats1.errors = 0; final tb.stats1.errors = 0; "
VERILOG = {
    "wrong": attack(NOTHING, WRONG),
    "nothing_connected": attack("", WRONG),
    "forged_line": attack(NOTHING + '  initial $display("Mismatches: 0 in {n} samples");\n', "suspicious"),
    "forged_line_at_the_end": attack(
        NOTHING + '  final begin $display("Mismatches: 0 in {n} samples"); $write("x"); end\n', "suspicious"
    ),
    "finish": attack(NOTHING + "  initial $finish;\n", "suspicious"),
    "finish_escaped": attack(NOTHING + "  initial \\$finish ;\n", "suspicious"),
    "stop": attack(NOTHING + "  initial #7 $stop;\n", "suspicious"),
    "fatal": attack(NOTHING + "  initial $fatal(0);\n", "suspicious"),
    "reference": attack("  reference_module r(.a(a), .b(b), .y(y));\n", "suspicious"),
    "reference_escaped": attack("  \\reference_module r(.a(a), .b(b), .y(y));\n", "suspicious"),
    "hidden_between_quotes": attack(
        NOTHING + '  wire \\a" ; initial tb.stats1.errors = 0; wire \\b" ;\n', "suspicious"
    ),
    "name_of_the_bench": attack("  assign y = y_ref;\n", WRONG, "compile_error"),
    "clock_of_the_bench": attack(NOTHING + "  initial clk = 0;\n", "compile_error"),
    "reference_macro": attack("`define N(x) reference_``x\n  `N(module) r(.a(a), .b(b), .y(y));\n", "suspicious"),
    "result_of_the_reference": attack("  assign y = good1.y;\n", "suspicious"),
    "count_set": attack(NOTHING + "  always @(a) tb.stats1.errors = 0;\n", "suspicious"),
    "count_set_upwards": attack(NOTHING + "  always @(a) stats1.errors = 0;\n", "suspicious"),
    "clock_stopped": attack(NOTHING + "  initial force tb.clk = 0;\n", "suspicious"),
    "design_file": attack(NOTHING + '  integer n; initial n = $fopen("{canary}", "w");\n', "suspicious"),
    "include": attack('`include "/etc/passwd"\n' + NOTHING, "suspicious"),
    "second_bench": attack(NOTHING + "endmodule\nmodule tb();\n", "suspicious"),
    "endless_at_once": attack("  reg r; assign y = r; always @(r) r <= ~r; initial r = 0;\n", "timeout"),
    "design_output": attack(NOTHING + '  initial forever $display("xxxxxxxxxxxxxxxxxxxxxxxx");\n', "output_limit"),
    "compiler_endless": attack(
        "  function integer g(input integer n); begin g = n; while (1) g = g + 1; end endfunction\n"
        "  localparam N = g(1);\n  assign y = N;\n",
        "timeout",
    ),
    "compiler_memory": attack(
        NOTHING + "  genvar i;\n  generate for (i = 0; i < 20000000; i = i + 1) begin : g wire [99:0] w; end\n"
        "  endgenerate\n",
        "memory",
        "timeout",
    ),
    "simulator_memory": attack(NOTHING + "  reg [1023:0] m [0:67108863]; initial m[67108863] = 1;\n", "memory", RAISED,
                               "compile_error"),
    "macros_joined": attack("`define A reference_\n`define B module\n`A`B r(.a(a), .b(b), .y(y));\n", "suspicious"),
    "macro_argument_joined": attack("`define A(x) reference_`x\n`define B module\n`A(B) r(.a(a), .b(b), .y(y));\n",
                                    "suspicious"),
    "macro_comment": attack("`define A reference_/**/module\n`A r(.a(a), .b(b), .y(y));\n", "suspicious"),
    "quotes_left_out": attack('`ifdef NO " `endif reference_module r(.a(a), .b(b), .y(y)); `ifdef NO " `endif\n',
                              "suspicious"),
    "carriage_return": attack("// comment\rreference_module r(.a(a), .b(b), .y(y));\n", "suspicious"),
    "finish_joined": attack(NOTHING + "`define X ish\n  initial #1 $fin`X ;\n", "suspicious"),
    "input_forced": attack(NOTHING + "  initial force a = 1'bx;\n", "suspicious"),
    "input_wired": attack(NOTHING + "  supply0 w; tran(a, w);\n", "suspicious"),
    "input_driven": attack(NOTHING + "  assign a = 1'bx; assign b = 1'bx;\n", "suspicious"),
    "input_driven_strongly": attack(NOTHING + "  assign (supply0, supply1) a = 0;\n", "suspicious"),
    "input_as_output": attack(NOTHING + "  child c(a);\nendmodule\nmodule child(output q);\n  assign q = 1'bx;\n",
                              "suspicious"),
    "input_as_inout": attack(NOTHING + "  child c(a);\nendmodule\nmodule child(inout q);\n  supply0 q;\n",
                             "suspicious"),
    # the model's own header
    "input_declared_output": attack("module top_module(output a, output b, output y);\n  assign {a, b, y} = 3'bx;\n",
                                    "suspicious"),
    "input_of_a_net_that_drives": attack("module top_module(input supply0 a, input supply0 b, output y);\n" + NOTHING,
                                         "suspicious"),
    "port_of_the_reference": attack("module top_module(input a, b, y_ref, output y);\n  assign y = y_ref;\n",
                                    "suspicious"),
    # what the compiler reads otherwise than it looks
    "name_ended_by_backspace": attack(
        NOTHING + "  wire x;\n" + "".join(
            f'  {when} begin $display(\\x\b,"a b"); tb.stats1.errors = 0; $display("c"); end\n'
            for when in ("always @(a, b)", "final")
        ),
        "suspicious", "syntax_error",
    ),
    "name_with_a_control_character": attack(
        NOTHING + '  wire \\a\x1c" ;' + CLEARING + 'wire \\b\x1c" ;\n', "suspicious", "syntax_error"
    ),
    "name_with_a_wide_space": attack(NOTHING + '  wire \\a\u3000" ;' + CLEARING + 'wire \\b\xa0" ;\n', "suspicious"),
    "name_behind_a_number": attack(NOTHING + "  always #1tb.clear;\n", "suspicious"),
    "word_behind_a_number": attack(NOTHING + "  initial #1force a = 0;\n", "suspicious"),
    "line_directive": attack(
        NOTHING + '#line "x" 1 /*\n' + CLEARING + '\n#line "x" 1 */\n', "suspicious"
    ),
    # upwards
    "task_of_the_bench": attack(NOTHING + "  always @(a, b) clear;\n  final clear;\n", "suspicious"),
    "task_of_the_bench_beside_its_own": attack(
        NOTHING + "  task own; clear; endtask\n  always @(a, b) own;\n  final own;\n", "suspicious"
    ),
    "block_of_the_bench": attack("  assign y = watch.good;\n", "suspicious"),
    "block_of_the_bench_ended": attack(NOTHING + "  initial #1 disable watch;\n", WRONG, "suspicious"),
    # it follows the testbench's numbers, and passes over those that it cannot answer
    "chance": attack(
        NOTHING + "  integer mine = 0, next, passed;\n  initial forever begin\n    #4 next = mine;\n"
        "    while ($random(next) & 1) begin mine = next; passed = $random; end\n    mine = next; #6;\n  end\n",
        "suspicious",
    ),
    "inputs_driven_together": attack(NOTHING + "  child c({a, b});\nendmodule\nmodule child(output [1:0] q);\n"
                                     "  assign q = 2'bx;\n", "suspicious"),
    "other_system_task": attack(NOTHING + '  initial $sdf_annotate("/etc/passwd");\n', "suspicious"),
    "end_behind_a_number": attack(NOTHING + "  initial #1$finish;\n", "suspicious"),
    "syntax": attack("  assign y = = a;\n", "syntax_error"),
    "undeclared": attack("  assign y = nothing.here;\n", "compile_error"),
}  # fmt: skip


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file that everybody may write, in a folder that everybody may enter."""
    folder = Path("/var/tmp") / f"ibft-canary-{os.getpid()}"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    file = folder / "canary"
    file.write_text("alive")
    file.chmod(0o666)
    yield file
    file.unlink(missing_ok=True)
    folder.rmdir()


@pytest.fixture(scope="module")
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield server


def filled(source: str, canary: Path, port: int) -> str:
    """Without str.format, whose braces the sources use themselves. A correct design is compared in 39 samples."""
    for name, value in {"canary": canary, "port": port, "pid": os.getpid(), "n": 39}.items():
        source = source.replace(f"{{{name}}}", str(value))
    return source


def judge(sandbox: Sandbox, name: str, source: str) -> Verdict:
    if name in PYTHON or name == "correct":
        return python_verdict.judge(sandbox, SQUARE, source, LIMITS)
    header = "" if source.startswith("module top_module(") else HEADER
    return verilog_verdict.judge(sandbox, AND, f"{header}{source}endmodule\n", LIMITS, samples=39)


def of_ours() -> set[int]:
    """Processes with the environment that only our sandboxes give."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        if b"PYTHONHASHSEED=0\0" in environment and b"PYTHONDONTWRITEBYTECODE=1\0" in environment:
            found.add(int(folder.name))
    return found


def keeper(pid: int, sandboxed: set[int]) -> int:
    """Who runs it: the first process above that is not in a sandbox; init, if it is an orphan."""
    while pid in sandboxed:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile
            return 0
    return pid


def assert_gone(before: set[int]) -> None:
    """What is new has ended, but for what another run on this machine has started."""
    deadline = time.monotonic() + 10
    while True:
        sandboxed = of_ours()
        left = {pid for pid in sandboxed - before if keeper(pid, sandboxed) in (1, os.getpid())}
        if not left:
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def zombies() -> list[str]:
    """The parents of processes that ended and that nobody waited for."""
    stats = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            stats.append(file.read_text(errors="replace").rpartition(")")[2].split())
        except OSError:
            continue
    return [stat[1] for stat in stats if stat[0] == "Z"]


def descendants(pid: int) -> list[int]:
    return [child for thread in Path(f"/proc/{pid}/task").iterdir() for child in children(thread)]


def children(thread: Path) -> list[int]:
    return [int(word) for word in (thread / "children").read_text().split()]


@pytest.fixture(scope="module")
def verdicts(
    sandbox: Sandbox, canary: Path, listener: socket.socket, iverilog: None
) -> dict[str, tuple[Verdict, float]]:
    """All attacks and correct programs between them, four at a time: the verdicts, and the seconds until each."""
    port = listener.getsockname()[1]
    sources = {name: filled(attack.source, canary, port) for name, attack in {**PYTHON, **VERILOG}.items()}
    before = of_ours(), set(os.listdir("/tmp"))

    def one(name: str) -> tuple[Verdict, float]:
        started = time.monotonic()
        return judge(sandbox, name, sources[name]), time.monotonic() - started

    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(sources, pool.map(one, sources), strict=True))
    assert not descendants(os.getpid())
    assert_gone(before[0])
    assert not {name for name in set(os.listdir("/tmp")) - before[1] if name.startswith("ibft-sandbox")}
    return found


@pytest.mark.parametrize("name", [*PYTHON, *VERILOG])
def test_an_attack_ends_in_its_category(name: str, verdicts: dict[str, tuple[Verdict, float]]) -> None:
    verdict, seconds = verdicts[name]
    assert verdict.category in {**PYTHON, **VERILOG}[name].categories, verdict
    assert seconds < LIMITS.wall_seconds + 4


def test_no_attack_did_harm(verdicts: dict[str, tuple[Verdict, float]], canary: Path, listener: socket.socket) -> None:
    assert canary.read_text() == "alive"
    assert os.listdir(canary.parent) == [canary.name]
    assert not Path("/usr/lib/harmed").exists()
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_no_attack_leaves_a_zombie(verdicts: dict[str, tuple[Verdict, float]]) -> None:
    time.sleep(0.2)
    assert str(os.getpid()) not in zombies()


def test_honest_programs_pass_beside_attacks(sandbox: Sandbox, iverilog: None) -> None:
    with ThreadPoolExecutor(4) as pool:
        attacks = [
            pool.submit(judge, sandbox, name, PYTHON[name].source)
            for name in ("forks_that_fork", "memory_of_many", "output")
        ]
        honest = [pool.submit(judge, sandbox, "correct", "def f(x):\n    return x * x") for _ in range(6)]
        honest += [pool.submit(judge, sandbox, "and", "  assign y = a & b;\n") for _ in range(4)]
    assert Counter(future.result().category for future in honest) == {"passed": 10}
    assert all(future.result().category != "passed" for future in attacks)


def test_a_patched_end_of_a_loop_does_not_end_the_tests(sandbox: Sandbox) -> None:
    mapped = replace(
        SQUARE, test="def check(candidate):\n    for value in map(candidate, [1, 2]):\n        assert value"
    )
    verdict = python_verdict.judge(sandbox, mapped, "def f(x):\n    raise StopIteration", LIMITS)
    assert verdict.category == "runtime_error"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_mixed_samples_leave_nothing(
    sandbox: Sandbox, canary: Path, listener: socket.socket, iverilog: None
) -> None:
    port = listener.getsockname()[1]
    quick = {
        name: attack
        for name, attack in {**PYTHON, **VERILOG}.items()
        if not attack.categories & {"timeout"} and name not in ("memory_of_many", "forks")
    }
    slow = [name for name in {**PYTHON, **VERILOG} if name not in quick]
    rng = random.Random(0)
    names = [name for name in slow for _ in range(4)]
    names += [rng.choice([*quick, "correct"]) for _ in range(2000 - len(names))]
    rng.shuffle(names)
    before = of_ours(), set(os.listdir("/tmp")), threading.active_count(), len(os.listdir("/proc/self/fd"))

    def one(name: str) -> str:
        if name == "correct":
            return judge(sandbox, name, "def f(x):\n    return x * x").category
        return judge(sandbox, name, filled({**PYTHON, **VERILOG}[name].source, canary, port)).category

    with ThreadPoolExecutor(4) as pool:
        found = list(zip(names, pool.map(one, names), strict=True))
    for name, category in found:
        assert category in ({"passed"} if name == "correct" else {**PYTHON, **VERILOG}[name].categories), name
    assert not descendants(os.getpid())
    assert_gone(before[0])
    assert {name for name in os.listdir("/tmp") if name.startswith("ibft-sandbox")} <= before[1]
    assert threading.active_count() == before[2]
    assert len(os.listdir("/proc/self/fd")) == before[3]
    assert str(os.getpid()) not in zombies()
    assert canary.read_text() == "alive"
