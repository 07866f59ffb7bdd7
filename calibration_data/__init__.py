"""edgecomp.calibration_data"""
