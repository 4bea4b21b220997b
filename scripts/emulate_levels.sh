#!/usr/bin/env bash
# The expert kernels, as setup.py compiles them, on an emulated CPU that has AVX-512 or AMX: native/test/driver.cpp on a
# small Linux inside Bochs. Needs Debian's packages busybox-static, cpio, isolinux, syslinux-common and xorriso, its
# kernel (linux-image-amd64) or another that boots without modules, and Bochs, made and installed with
#   ./configure --enable-cpu-level=6 --enable-x86-64 --enable-avx --enable-evex --enable-amx --enable-pci \
#     --enable-all-optimizations --with-nogui
# tigerlake has AVX-512. sapphire_rapids has VDPBF16PS and AMX too, but Linux wants XFD for it, which Bochs 3.0 lacks: for AMX mend
# Bochs first (CPUID leaf 13, MSRs 0x1c4 and 0x1c5, #NM; and cpu/xsave.cc, which saves tiles wrongly).
# Usage: [MODEL=tigerlake] [PYTHON=python3] [CXX=c++] emulate_levels.sh BOCHS VMLINUZ [rounds [seed]]
set -euo pipefail
[[ $# -ge 2 ]] || { sed -n '2,/^set/{/^#/p}' "$0"; exit 2; }
bochs=$(realpath "$1") kernel=$(realpath "$2") rounds=${3:-54} seed=${4:-1} model=${MODEL:-tigerlake}
share=${BXSHARE:-$(dirname "$bochs")/../share/bochs}
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
wanted="portable avx2 avx512"
[[ $model != sapphire_rapids ]] || wanted+=" avx512_bf16 amx"

"${PYTHON:-python3}" setup.py -q build_ext --build-temp "$work/objects" --build-lib "$work/library"
mkdir -p "$work"/root/{bin,proc} "$work"/disc
"${CXX:-c++}" -std=c++20 -O2 -static -pthread native/test/driver.cpp "$work"/objects/*.o -o "$work/root/driver"
cp "$(command -v busybox)" "$work/root/bin/busybox"
cat >"$work/root/init" <<INIT
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox grep -m2 "^model name\|^flags" /proc/cpuinfo
/driver $rounds $seed $wanted 2>&1
echo "driver: exit \$?"
exec /bin/busybox sleep 1000000
INIT
chmod +x "$work/root/init"
(cd "$work/root" && find . | cpio -o -H newc --quiet | gzip -1) >"$work/disc/initrd.gz"
cp "$kernel" "$work/disc/vmlinuz"
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$work/disc"
cat >"$work/disc/isolinux.cfg" <<CONFIG
default linux
label linux
  kernel vmlinuz
  append initrd=initrd.gz console=ttyS0 quiet mitigations=off nokaslr tsc=reliable clearcpuid=fsrm
CONFIG
xorriso -as mkisofs -quiet -o "$work/disc.iso" -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 \
  -boot-info-table "$work/disc"
cat >"$work/bochsrc" <<CONFIG
display_library: nogui
megs: 1024
romimage: file=$share/BIOS-bochs-latest
vgaromimage: file=$share/VGABIOS-lgpl-latest.bin
cpu: model=$model, count=1, ips=50000000, reset_on_triple_fault=0
ata0-master: type=cdrom, path=$work/disc.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$work/serial
log: $work/log
CONFIG
: >"$work/serial"
tail -f "$work/serial" & shown=$!
"$bochs" -q -f "$work/bochsrc" >"$work/console" 2>&1 & machine=$!
trap 'kill $shown $machine; rm -rf "$work"' EXIT
until grep -q "^driver: exit\|Kernel panic" "$work/serial"; do
  kill -0 $machine || { tail -n 5 "$work/console"; exit 1; }
  sleep 5
done
sleep 2
grep -q "^driver: exit 0" "$work/serial"
