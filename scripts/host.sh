#!/usr/bin/env bash
# scripts/host.sh COMMAND: gets a GPU machine ready, and runs the pipeline there after you log out (docs/rented-host.md).
#
#   check              looks at what must be right before anything is installed; changes nothing
#   setup              check, install into .venv (on a GPU with vLLM), then `python -m stages check`
#   --no-vllm          after check or setup: without vLLM; generation then takes about four times as long
#   start [ARGUMENTS]  runs `dvc repro ARGUMENTS` in tmux
#   status             says whether it runs or how it ended, and shows the end of its log
#   attach             shows it; Ctrl-b, then d, leaves it running
#   stop               ends it, as Ctrl-C would; start goes on where it was
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH=2.13.0 CUDA=13.0 DRIVER=580 # the pinned torch, the CUDA it is built for, the oldest NVIDIA driver for that
LOG=.work/host/log
SESSION=looper-$(printf '%s' "$PWD" | cksum | cut -d ' ' -f 1)

die() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

# ---- Before anything is installed ----------------------------------------------------------------------

problems=0
ok() { printf 'ok    %s\n' "$1"; }
no() {
    problems=$((problems + 1))
    printf 'NO    %s\n' "$1"
}

at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; } # WANTED FOUND

gpu=0
check_driver() {
    local found
    if ! command -v nvidia-smi >/dev/null; then
        ok "no NVIDIA driver: everything will run on the processor"
    elif ! found=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>&1); then
        no "nvidia-smi fails: ${found%%$'\n'*}. Reboot, or take another image"
    elif ! at_least $DRIVER "$found"; then
        no "NVIDIA driver ${found%%$'\n'*} is too old: torch $TORCH is built for CUDA $CUDA, which needs $DRIVER or newer"
    else
        gpu=1
        ok "NVIDIA driver ${found%%$'\n'*}, $(wc -l <<<"$found") GPU(s)"
    fi
}

python=
check_python() {
    local name version found='' imports='import ensurepip, venv'
    [ $gpu = 0 ] || imports+=', os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' # for Triton
    for name in .venv/bin/python ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        version=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        if at_least 3.11 "$version" && "$name" -c "$imports" 2>/dev/null; then
            python=$name
            ok "Python $version ($name)"
            return
        fi
        found+=" $version"
    done
    no "Python 3.11 or newer with venv, on a GPU also Python.h, is needed (found:${found:- none}); docs/rented-host.md"
}

check_tools() {
    local name missing=() tools=(git make tmux)
    for name in "${tools[@]}"; do
        command -v "$name" >/dev/null || missing+=("$name")
    done
    if [ ${#missing[@]} = 0 ]; then ok "${tools[*]}"; else no "missing: sudo apt-get install -y ${missing[*]}"; fi
}

# Triton builds a piece of C for each kernel: by CC, else gcc, else clang, with Python's headers and libc's.
check_compiler() {
    local cc include said
    [ $gpu = 1 ] && [ -n "$python" ] || return 0
    cc=${CC:-$(command -v gcc || command -v clang || true)}
    include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    if [ -z "$cc" ]; then
        no "no C compiler, with which Triton builds for the GPU: sudo apt-get install -y gcc libc6-dev"
    elif said=$(echo '#include <Python.h>' | "$cc" -x c -fsyntax-only "-I$include" - 2>&1); then
        ok "C compiler (${cc##*/})"
    else
        no "${cc##*/} cannot compile for Triton (${said%%$'\n'*}): sudo apt-get install -y gcc libc6-dev"
    fi
}

check_disk() { # GB that .venv and pip's downloads take, with torch's CUDA and with vLLM
    local need=0 free say=ok
    [ -e .venv/installed ] || need=9
    [ $gpu = 0 ] || [ $vllm = 0 ] || [ -e .venv/installed-gpu ] || need=$((need + 6))
    free=$(df -Pk . | awk 'NR == 2 {print int($4 * 1.024e-6)}')
    [ "$free" -ge $need ] || say=no
    $say "disk: $need GB needed to install, $free GB free"
}

vllm=1
check() { # [--no-vllm]
    case "${*:-}" in
        '') ;;
        --no-vllm) vllm=0 ;;
        *) die "no option '$*': scripts/host.sh help" ;;
    esac
    check_driver
    check_python
    check_tools
    check_compiler
    check_disk
    [ $problems = 0 ] || die "$problems to put right first"
}

setup() {
    check "$@"
    make --no-print-directory "PYTHON=$python" .venv/installed .venv/installed-remote
    [ $gpu = 0 ] || [ $vllm = 0 ] || make --no-print-directory "PYTHON=$python" .venv/installed-gpu
    .venv/bin/python -m stages check
}

# ---- The run -------------------------------------------------------------------------------------------

# A tmux server of its own has the environment of this shell; one that runs already would have an older one.
in_tmux() { TMUX='' tmux -L "$SESSION" "$@"; }
running() { in_tmux has-session -t run 2>/dev/null; }
note() { printf '=== %s %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$1"; }

start() {
    [ -x .venv/bin/dvc ] || die "there is no .venv yet: scripts/host.sh setup"
    ! running || die "it runs already; scripts/host.sh status says more"
    mkdir -p "$(dirname $LOG)"
    note "dvc repro $*" >>$LOG
    in_tmux new-session -d -s run -x 160 -y 50 bash scripts/host.sh inside-tmux "$@"
    echo "started; you may log out. Later: scripts/host.sh status, attach or stop"
}

inside_tmux() {
    trap : INT # Ctrl-C ends dvc and its stage, but neither this shell nor (-i) the log
    export PATH="$PWD/.venv/bin:$PATH" PYTHONUNBUFFERED=1
    if dvc repro "$@"; then note "finished well"; else note "ended with status $?"; fi 2>&1 | tee -i -a $LOG
}

status() {
    [ -f $LOG ] || die "nothing was started here: scripts/host.sh start"
    local code=0
    if running; then
        echo "running"
    elif tail -n 1 $LOG | grep -q '^=== .* finished well$'; then
        echo "finished well"
    else
        code=1
        echo "ended early; scripts/host.sh start goes on where it was"
    fi
    tail -n 5 $LOG
    return $code
}

stop() {
    running || die "nothing runs: scripts/host.sh status"
    in_tmux send-keys -t run C-c
    while running; do sleep 1; done
    echo "stopped; scripts/host.sh start goes on where it was"
}

command=${1:-help}
shift $(($# > 0))
case $command in
    start) start "$@" ;;
    inside-tmux) inside_tmux "$@" ;;
    check | setup) "$command" "$@" ;;
    status | stop) "$command" ;;
    attach) in_tmux attach -t run || die "nothing runs: scripts/host.sh status" ;;
    help | --help | -h) sed -n '2,/^set/s/^# \{0,1\}//p' scripts/host.sh ;;
    *) die "no command '$command': scripts/host.sh help" ;;
esac
