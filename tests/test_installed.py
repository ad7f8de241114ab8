"""The command `routesae`, in the checkout and where the package is installed."""

import re
import shutil
import subprocess
import sys
import tomllib

import pytest

import routesae
from src import config, files

ROOT = files.ROOT
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def lines_of(name):
    """The requirements in a file, without comments."""
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in lines if line]


def test_the_package_needs_what_the_requirement_files_say():
    project = PROJECT["project"]
    assert project["dependencies"] == lines_of("requirements.txt")
    assert project["optional-dependencies"]["gguf"] == lines_of("requirements-gguf.txt")
    assert project["optional-dependencies"]["explore"] == lines_of("requirements-explore.txt")
    assert project["optional-dependencies"]["probing"] == lines_of("requirements-probing.txt")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package as a wheel lays it out, by the patterns of pyproject.toml."""
    site = tmp_path_factory.mktemp("site")
    package = site / "routesae"
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["sources"] == {"": "routesae"}
    for pattern in wheel["include"]:
        for path in ROOT.glob(pattern.strip("/")):
            target = package / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if path.is_dir() else shutil.copy)(path, target)
    (package / "routesae.py").unlink()
    for source, target in wheel["force-include"].items():
        shutil.copy(ROOT / source, package / target)
    return site


def run(site, code, *argv, cwd):
    """Run Python code beside the installed package, as the command of a console script does."""
    return subprocess.run(
        [sys.executable, "-c", code, *argv],
        cwd=cwd,
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(cwd)},
        capture_output=True,
        text=True,
    )


COMMAND = "import sys, routesae; sys.argv[0] = '/x/bin/routesae'; sys.exit(routesae.main())"


def test_every_stage_of_the_installed_command_answers(installed, tmp_path):
    done = run(installed, COMMAND, cwd=tmp_path)
    assert done.returncode == 0
    assert set(re.findall(r"^  (\w+)", done.stdout, re.M)) == {
        *config.STAGES,
        *routesae.SMALL_PROGRAMS,
    }
    for name in config.STAGES:
        done = run(installed, COMMAND, name, "--help", cwd=tmp_path)
        assert done.returncode == 0 and f"usage: routesae {name} " in done.stdout, done.stderr
    done = run(installed, COMMAND, "plots", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "usage: routesae plots " in done.stdout, done.stderr


def test_errors_of_the_installed_command_name_it(installed, tmp_path):
    done = run(installed, COMMAND, "trian", cwd=tmp_path)
    assert done.returncode == 2 and "did you mean train?" in done.stderr
    done = run(installed, COMMAND, "evaluate", "--SAE_path", "none.pt", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("routesae evaluate: error: no checkpoint at none.pt")


def test_an_installed_package_takes_no_name_but_its_own(installed, tmp_path):
    assert [path.name for path in installed.iterdir()] == ["routesae"]
    (tmp_path / "src.py").write_text("its_own = True")
    code = "import routesae, src; assert src.its_own"
    assert (
        run(installed, f"import sys; sys.path.insert(0, ''); {code}", cwd=tmp_path).returncode == 0
    )
    code += "; routesae.Reader"
    done = run(installed, f"import sys; sys.path.insert(0, ''); {code}", cwd=tmp_path)
    assert "has another package called src" in done.stderr
    code = "import routesae; print(routesae.Reader.__name__)"
    done = run(installed, code, cwd=tmp_path)
    assert done.stdout == "Reader\n", done.stderr


def test_installed_files_lie_in_the_current_folder_and_claim_no_commit(installed, tmp_path):
    code = (
        "import routesae; routesae._find_modules();"
        "from src import checkpoint, files; import torch;"
        "print(files.data_dir(), checkpoint.environment()['git_commit'], files.DEMO_LM.is_dir())"
    )
    done = run(installed, code, cwd=tmp_path)
    assert done.stdout == "data None True\n", done.stderr
