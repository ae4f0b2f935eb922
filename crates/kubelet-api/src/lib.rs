//! Types of the kubelet's device plugin v1beta1 and pod resources v1 interfaces, generated from proto/.
