# What `demo/run`, `tests/run` and `.ci/run` need before they build: sourced by them, from anywhere.
# Goes to the root of the checkout and sees to a C++ compiler, cmake, ninja and a Rust toolchain.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

if ! command -v cargo >/dev/null && [ -f "$HOME/.cargo/env" ]; then
    . "$HOME/.cargo/env"
fi
if ! command -v cargo >/dev/null; then
    echo "A Rust toolchain is needed (1.89 or newer): https://rustup.rs" >&2
    exit 1
fi

# Installs packages of Debian through apt, as root or with sudo; where it cannot, says what to do and fails.
install_packages() {
    local as_root=()
    if ! command -v apt-get >/dev/null; then
        echo "Please install what these packages of Debian hold: $*" >&2
        return 1
    elif [ "$(id -u)" != 0 ]; then
        as_root=(sudo)
        if ! command -v sudo >/dev/null; then
            echo "Please run as root: apt-get update && apt-get install -y $*" >&2
            return 1
        fi
    fi
    echo "Installing $*"
    "${as_root[@]}" apt-get update -qq &&
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
}

packages=()
command -v c++ >/dev/null && command -v cc >/dev/null || packages+=(build-essential)
command -v cmake >/dev/null || packages+=(cmake)
command -v ninja >/dev/null || packages+=(ninja-build)
[ ${#packages[@]} = 0 ] || install_packages "${packages[@]}" || exit 1
