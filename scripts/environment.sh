# Sourced by demo.sh and test.sh: makes .venv if absent, installs the project with the given extras.
# PYTHON chooses the interpreter; pip's own variables (PIP_INDEX_URL, PIP_CONSTRAINT, ...) apply.

is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

has_pip() {
  .venv/bin/python -c 'import pip' 2>/dev/null
}

make_environment() {
  local python="${PYTHON:-python3}" is_new=1
  if ! is_new_enough "$python"; then
    echo "error: $python is not Python 3.10 or newer; set PYTHON to one that is" >&2
    exit 2
  fi
  [ ! -e .venv ] || is_new=0
  "$python" -m venv .venv > /dev/null 2>&1 || true
  # Debian and Ubuntu keep what puts pip into an environment in a package of its own, python3-venv;
  # the pip outside can do it.
  if ! has_pip && "$python" -m venv --without-pip .venv 2>/dev/null; then
    "$python" -m pip install --quiet --disable-pip-version-check pip --target \
      "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
      > /dev/null 2>&1 || true
  fi
  if ! has_pip; then
    if [ "$is_new" -eq 1 ]; then
      rm -rf .venv
      echo "error: $python cannot make .venv; install its venv (apt install python3-venv)" >&2
    else
      echo "error: .venv has no pip, and $python cannot put it there; remove .venv" >&2
    fi
    exit 2
  fi
}

install_project() {
  local extras="${1:-}"
  if [ -x .venv/bin/python ] && ! is_new_enough .venv/bin/python; then
    echo "error: .venv is not of Python 3.10 or newer; remove it, and set PYTHON to one that is" >&2
    exit 2
  fi
  if ! has_pip; then
    make_environment
  fi
  # Installed once per state of pyproject.toml and choice of extras.
  local stamp=".venv/.installed${extras}" state
  state="$(cksum pyproject.toml)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$state" ]; then
    echo "installing into .venv (once; PyTorch is large)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extras}"
    echo "$state" > "$stamp"
  fi
}
