"""命令行的骨架：帮助、用法错误、延迟导入、缺依赖的命令。"""

import subprocess
import sys
import types

import pytest
import typer

from deepseek_opt import cli
from deepseek_opt.errors import ConfigError


@pytest.fixture
def call(capsys):
    """运行命令行，返回 (退出码, 标准输出, 标准错误)。"""

    def _call(*args):
        code = cli.run(args)
        out, err = capsys.readouterr()
        return code, out, err

    return _call


@pytest.fixture
def fake_command(monkeypatch):
    """换上一个假的 bench 命令。"""

    def _install(register):
        module = types.ModuleType("deepseek_opt.cli.bench")
        module.register = register
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(cli, "_exists", lambda name: name in ("doctor", "bench"))

    return _install


@pytest.mark.parametrize("args", [(), ("--help",)])
def test_help_is_chinese(call, args):
    code, out, _ = call(*args)
    assert code == 0
    for word in ("doctor", "presets", "verify", "命令", "选项", "显示帮助并退出"):
        assert word in out


def test_command_help_is_chinese(call):
    code, out, _ = call("verify", "--help")
    assert code == 0
    assert "显示帮助并退出" in out
    assert "--prompt-file" in out


def test_version(call):
    from deepseek_opt import __version__

    assert call("--version") == (0, f"deepseek-opt {__version__}\n", "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("docter",), "没有命令 docter；是不是想写 doctor？"),
        (("xyz",), "可用的命令："),
        (("--nope",), "没有选项 --nope"),
        (("doctor", "--jsn"), "没有选项 --jsn；是不是想写 --json？"),
        (("verify",), "缺少参数 MODEL_DIR"),
        (("verify", "a", "--dtype"), "选项 --dtype 缺少值"),
        (("verify", "a", "--max-tokens", "x"), "参数 --max-tokens 的值不对：应为整数"),
        (("presets", "--output", "a.yaml"), "--output 需要同时给出预设的名字"),
    ],
)
def test_usage_errors(call, args, message):
    code, out, err = call(*args)
    assert (code, out) == (2, "")
    assert message in err
    assert "deepseek-opt --help" in err


def test_usage_error_without_details_keeps_its_text(call):
    code, _, err = call("doctor", "extra")
    assert code == 2
    assert "extra" in err


def test_other_modules_register_the_same_way(call, fake_command):
    def register(app):
        bench = typer.Typer(help="测速")

        @bench.command("mla", help="注意力")
        def _mla(rows: int = 1):
            typer.echo(f"rows={rows}")

        @bench.command("moe")
        def _moe():
            raise typer.Exit(3)

        app.add_typer(bench, name="bench")

    fake_command(register)
    assert "测速" in call("--help")[1]
    assert call("bench", "mla", "--rows", "4")[:2] == (0, "rows=4\n")
    assert call("bench", "moe")[0] == 3
    assert "显示帮助并退出" in call("bench", "mla", "--help")[1]


def test_missing_dependency_only_affects_its_command(call, fake_command):
    def register(app):
        raise ModuleNotFoundError("没有", name="matplotlib")

    fake_command(register)
    assert "不可用：缺少 matplotlib" in call("--help")[1]
    code, _, err = call("bench", "--anything", "1")
    assert code == 1
    assert "命令 bench 用不了：缺少 matplotlib，请先安装" in err
    assert call("doctor", "--help")[0] == 0


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (ConfigError("配置错了"), 1, "错误：配置错了"),
        (KeyboardInterrupt(), 130, "已中断"),
        (typer.Abort(), 130, "已中断"),
    ],
)
def test_errors_have_no_traceback(call, fake_command, raised, code, message):
    def register(app):
        @app.command("bench")
        def _bench():
            raise raised

    fake_command(register)
    got, _, err = call("bench")
    assert got == code
    assert message in err
    assert "Traceback" not in err


def test_main_exits_with_the_code(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["deepseek-opt", "presets", "none"])
    with pytest.raises(SystemExit) as info:
        cli.main()
    assert info.value.code == 1


def test_starts_without_torch_and_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None; sys.modules['torch'] = None\n"
        "from deepseek_opt.cli import run\n"
        "assert run(['presets']) == 0\n"
        "sys.exit(run(['doctor']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "✗ torch：导入不了" in done.stdout
    assert "还不能使用" in done.stdout
