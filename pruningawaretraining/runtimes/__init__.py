"""Runtimes that models are measured and checked in: sessions, exporters, timing."""
