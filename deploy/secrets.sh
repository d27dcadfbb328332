#!/bin/sh
# Make the secrets of a cluster in a folder; those that are there already stay.
#   deploy/secrets.sh FOLDER [ROOST ...]     ROOST: how roost is called; default: roost
# For example: deploy/secrets.sh deploy/secrets docker run --rm roost/router
#
#   api-key, api-keys      a client's key; the hashes of all clients' keys, for the data port
#   admin-key, admin-keys  likewise of the admin port: for Prometheus, for `roost top`
#   cluster-secret         seals what routers tell each other through Redis
#   redis-password         of Redis' user "roost"
#   grafana-password       of Grafana's user "admin"
#   users.acl              Redis' users: that one, limited to its keys and commands, and no other
set -eu
folder=${1:?usage: deploy/secrets.sh FOLDER [ROOST ...]}
shift
[ $# -gt 0 ] || set -- roost
rules=$(cat "$(dirname "$0")/redis/roost.acl")

random() { od -An -N 32 -tx1 /dev/urandom | tr -d ' \n'; }
sha256() { { sha256sum 2>/dev/null || shasum -a 256; } | cut -d ' ' -f 1; }

# The folder is closed to others; the files are not, since containers read them as another user.
(umask 077 && mkdir -p "$folder")
for port in api admin; do
    [ -s "$folder/$port-keys" ] && continue
    made=$("$@" keys new --name "$port")
    echo "$made" | sed -n 1p | tr -d '\n' >"$folder/$port-key"
    echo "$made" | sed -n 2p >"$folder/$port-keys"
done
for name in cluster-secret redis-password grafana-password; do
    [ -s "$folder/$name" ] || random >"$folder/$name"
done
printf 'user default off\nuser roost on #%s %s\n' \
    "$(sha256 <"$folder/redis-password")" "$rules" >"$folder/users.acl"
