"""edgecomp.devices"""
