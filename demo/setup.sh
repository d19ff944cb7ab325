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

packages=()
command -v c++ >/dev/null && command -v cc >/dev/null || packages+=(build-essential)
command -v cmake >/dev/null || packages+=(cmake)
command -v ninja >/dev/null || packages+=(ninja-build)
if [ ${#packages[@]} -gt 0 ]; then
    if ! command -v apt-get >/dev/null; then
        echo "Please install a C++ compiler, cmake and ninja (on Debian: ${packages[*]})." >&2
        exit 1
    elif [ "$(id -u)" = 0 ]; then
        as_root=()
    elif command -v sudo >/dev/null; then
        as_root=(sudo)
    else
        echo "Please run as root: apt-get update && apt-get install -y ${packages[*]}" >&2
        exit 1
    fi
    echo "Installing ${packages[*]}"
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"
fi
