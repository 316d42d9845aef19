"""Activation stores to run folders."""
