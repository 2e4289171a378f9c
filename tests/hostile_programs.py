"""Python programs that attack the evaluation, and the problem that they claim to solve."""

from typing import NamedTuple

from ibft.evaluate.problems import Problem

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
