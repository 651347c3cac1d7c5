#!/bin/sh
# Builds SQLite's own test program from Debian's source package: `sh tests/sqlite_suite/build.sh FOLDER`. Safe to repeat.
#
# FOLDER/sqlite3-VERSION is the source, FOLDER/bld/testfixture the program, FOLDER/bld/sqlite3 the shell that some of the
# tests start. Needs Debian or its kin with the sources of its own mirror; as root, missing packages are installed.
set -eu
mkdir -p "$1"
cd "$1"
[ -e bld/ready ] && exit 0
folder=$(pwd)

if [ "$(id -u)" = 0 ] && ! dpkg -s tcl-dev zlib1g-dev dpkg-dev gcc make >/dev/null 2>&1; then
    echo "test-sqlite: installing tcl-dev, zlib1g-dev, dpkg-dev, gcc and make"
    DEBIAN_FRONTEND=noninteractive apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends -y \
        tcl-dev zlib1g-dev dpkg-dev gcc make libc6-dev >/dev/null
fi

# The machine's own sources, asked for source packages, in lists of our own: nothing of the machine's is changed.
rm -rf apt bld sqlite3-* sqlite3_*
mkdir -p apt/sources apt/lists/partial apt/cache/archives/partial
for file in /etc/apt/sources.list.d/*.sources; do
    [ -e "$file" ] && sed 's/^Types:.*/Types: deb-src/' "$file" >"apt/sources/$(basename "$file")"
done
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
    [ -e "$file" ] && sed -n 's/^deb /deb-src /p' "$file" >"apt/sources/$(basename "$file")"
done
apt() {
    apt-get -qq -o APT::Sandbox::User=root -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$folder/apt/sources" \
        -o Dir::State::lists="$folder/apt/lists" -o Dir::Cache="$folder/apt/cache" "$@"
}
apt update
apt source sqlite3 >apt/log 2>&1 || { cat apt/log >&2; exit 1; }
rm -rf apt sqlite3_*

echo "test-sqlite: building, for a minute or two"
mkdir bld
cd bld
../sqlite3-*/configure --enable-all --with-tcl="$(dirname "$(find /usr/lib -name tclConfig.sh | head -1)")" >log 2>&1
sed -i 's/-DSQLITE_NO_SYNC=1//' Makefile # the tests are to sync as an application does
make testfixture sqlite3 CFLAGS="-O1 -g0" >>log 2>&1 || { tail -20 log >&2; exit 1; }
touch ready
