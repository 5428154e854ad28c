"""What is not the method: settings, files, checkpoints, devices, downloads, pretrained weights.

Scripts import this package before torch, because OpenMP reads the following variable only once. By default its threads
spin while they wait for each other, and beside another busy process training gets 30 times slower.
"""
import os

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
