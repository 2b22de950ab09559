# Sourced by demo.sh and test.sh: makes .venv if absent, installs the project with the given extras.
# PYTHON chooses the interpreter; pip's own variables (PIP_INDEX_URL, PIP_CONSTRAINT, ...) apply.

install_project() {
  local extras="${1:-}"
  if [ ! -x .venv/bin/python ]; then
    local python="${PYTHON:-python3}"
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "error: $python is not Python 3.10 or newer; set PYTHON to one that is" >&2
      exit 2
    fi
    "$python" -m venv .venv
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
