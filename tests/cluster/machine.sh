#!/usr/bin/env bash
# A machine of a test cluster: process 1 of namespaces of its own, with containerd, the kubelet and kube-proxy.
#
#   machine.sh FOLDER NAME ADDRESSES BINARIES CGROUP...
#
# FOLDER has the configuration of each program and keeps what the machine writes: one that starts again in it finds
# its files. It may not be below /etc, /opt, /var or /run. process 1's number, as the host counts, is written to
# FOLDER/pid; the interface eth0 must then be moved in, and is set up by FOLDER/network. FOLDER/up is made when all
# programs are started. Ends when one of them ends.
set -euo pipefail
folder=$1 name=$2 addresses=$3 binaries=$4

if [ $$ -ne 1 ]; then
	for group in "${@:5}"; do echo $$ >"$group/cgroup.procs"; done
	exec unshare --fork --kill-child --pid --mount --net --uts --ipc --cgroup "$0" "$@"
fi

# This /proc is still the host's, and counts as the host does.
read -r pid _ </proc/self/stat
echo "$pid" >"$folder/pid.new"
mv "$folder/pid.new" "$folder/pid"
groups=$(awk '$3 == "cgroup" { print $2, $4 }' /proc/mounts)

hostname "$name"
mount -t proc proc /proc
mount -t sysfs sysfs /sys
if [ -n "$groups" ]; then
	mount -t tmpfs tmpfs /sys/fs/cgroup
	while read -r path options; do
		mkdir "$path"
		mount -t cgroup -o "$options" cgroup "$path"
	done <<<"$groups"
else
	# Of version 2, a group that has processes can hand no controller down.
	mount -t cgroup2 cgroup2 /sys/fs/cgroup
	mkdir /sys/fs/cgroup/init
	echo 1 >/sys/fs/cgroup/init/cgroup.procs
fi

# overlay LOWER TARGET: the host's files, with changes that stay in the machine's folder
overlay() {
	local state="$folder/changed$2"
	mkdir -p "$state"/{upper,work} "$2"
	mount -t overlay -o "lowerdir=$1,upperdir=$state/upper,workdir=$state/work" overlay "$2"
}
overlay /etc /etc
overlay /opt /opt
overlay /var /var
overlay /usr/lib/cni /opt/cni/bin
mount -t tmpfs tmpfs /run
for path in /etc/cni/net.d /var/lib/cni /var/lib/containerd /var/lib/kubelet /var/log/containers /var/log/pods; do
	mkdir -p "$path" "$folder/own$path"
	mount --bind "$folder/own$path" "$path"
done
md5sum <<<"$name" | cut -c -32 >/etc/machine-id

# The kubelet wants these values, which are the host's to set; it finds them here.
while read -r key value; do
	mkdir -p "$(dirname "$folder/sys/$key")"
	echo "$value" >"$folder/sys/$key"
	mount --bind "$folder/sys/$key" "/proc/sys/$key"
done <<-'END'
	vm/overcommit_memory 1
	kernel/panic 10
	kernel/panic_on_oops 1
END
# Pods that mount volumes for others need this; all mounts are made by now.
mount --make-rshared /

echo 1 >/proc/sys/net/ipv4/ip_forward
echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
until [ -e /sys/class/net/eth0 ]; do sleep 0.02; done
ip -batch "$folder/network"

declare -A programs
start() { # start NAME COMMAND...
	"${@:2}" &>>"$folder/$1.log" &
	programs[$!]=$1
}
start containerd containerd --config "$folder/containerd.toml"
until ctr version &>/dev/null; do
	kill -0 $!
	sleep 0.05
done
# As the kubelet would start it again, had it come as a pod.
start kube-proxy sh -c 'until "$@"; do sleep 0.1; done' - "$binaries/kube-proxy" --config="$folder/kube-proxy.json"
start kubelet "$binaries/kubelet" --config="$folder/kubelet.json" --kubeconfig="$folder/kubelet.kubeconfig" \
	--hostname-override="$name" --node-ip="$addresses"
touch "$folder/up"

wait -n -p ended || true
echo "${programs[$ended]} ended:"
tail -n 20 "$folder/${programs[$ended]}.log"
exit 1
