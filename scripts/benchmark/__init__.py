"""The parts of scripts/bench.py: images, servers, clients, the table of work, statistics, reports."""
