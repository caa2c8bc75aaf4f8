#!/bin/bash
set -e
mkdir -p /tmp/app
echo "$GREETING, world" > /tmp/app/greeting.txt
